"""Image files in folders: one folder a class, perhaps within train/, val/ and test/; and the arguments of `predict`."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from coatnet.data.decode import SUFFIXES
from coatnet.data.image_sets import FolderImages
from coatnet.errors import DataError

PARTS = {  # folder, in lower case -> part
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip


def open_folder(folder: Path) -> dict[str, FolderImages]:
    """Find the parts "train", "val" and "test" of a folder; one that holds classes only is all "train".

    Raises: DataError for no such folder, no picture, one class, an empty class, or parts of different classes.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "is not there"
        raise DataError(
            f"{folder} {what}. Give a folder with one subfolder of pictures a class, tar shards, or the name of a data "
            "set: fashion-mnist, digits or letters."
        )
    inside = _subfolders(folder)
    parts = [name for name in inside if name.casefold() in PARTS and _holds_classes(folder / name)]
    if not parts:
        return {"train": labelled_folder(folder)}
    if all(PARTS[name.casefold()] != "train" for name in parts):
        raise DataError(f"{folder} has {', '.join(parts)} but no train. Give {folder / parts[0]}, or add train.")
    if others := [name for name in inside if name not in parts]:
        raise DataError(f"{folder} has {', '.join(parts)} and beside them {others[0]}. Move it away, or into train.")
    found: dict[str, FolderImages] = {}
    trains = [name for name in parts if PARTS[name.casefold()] == "train"]
    train = labelled_folder(folder / trains[0], relative_to=folder)
    for name in parts:
        part = PARTS[name.casefold()]
        if part in found:
            raise DataError(f"{folder} has {part} twice, under two names ({', '.join(parts)}). Keep one.")
        found[part] = (
            train
            if part == "train"
            else labelled_folder(folder / name, relative_to=folder, class_names=train.class_names)
        )
    return found


def labelled_folder(
    folder: Path, *, relative_to: Path | None = None, class_names: tuple[str, ...] | None = None
) -> FolderImages:
    """List the pictures below each class folder, sorted by name whatever the file system's order.

    With `class_names`, which may be more than the folder's, the targets count in them. Names are relative to
    `relative_to`, or to the folder.

    Raises: DataError, one line.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not there. Give a folder with one subfolder of pictures a class.")
    root = relative_to or folder
    inside = _subfolders(folder)
    if loose := sorted(file.name for file in folder.iterdir() if _is_picture(file.name) and file.is_file()):
        raise DataError(f"{folder}: {loose[0]} lies beside the classes. Put each picture into the folder of its class.")
    files = {name: images_below(folder / name) for name in inside}
    if not any(files.values()):
        raise DataError(
            f"{folder} holds no picture ({', '.join(SUFFIXES)}) in a subfolder. Make one subfolder a class."
        )
    if class_names is None:
        _check_classes(folder, files)
        class_names = tuple(inside)
    elif unknown := [name for name in inside if files[name] and name not in class_names]:
        raise DataError(f"{folder} has the class {unknown[0]}, which training lacks ({_some(class_names)}).")
    class_index = {name: index for index, name in enumerate(class_names)}
    labelled = sorted((file.relative_to(root).as_posix(), class_index[name]) for name in files for file in files[name])
    names, targets = zip(*labelled, strict=True)
    return FolderImages(root, names, np.array(targets, dtype=np.int64), class_names)


def _check_classes(folder: Path, files: dict[str, list[Path]]) -> None:
    """Raise DataError unless there are two classes or more, each with a picture."""
    if empty := [name for name, found in files.items() if not found]:
        raise DataError(f"{folder}: the class {empty[0]} holds no picture. Fill its folder, or delete it.")
    if len(files) == 1:
        raise DataError(f"{folder} has one class, {next(iter(files))}. It takes two or more to tell apart.")


def images_below(folder: Path) -> list[Path]:
    """Return the image files below a folder, at any depth, sorted; what is hidden and other files are passed over."""
    found = list[Path]()
    for place, subfolders, names in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        found += [Path(place, name) for name in names if _is_picture(name)]
    return sorted(found)


def list_images(arguments: Sequence[str]) -> list[Path]:
    """Turn files, folders, patterns and "-" (paths from standard input, one a line) into image files.

    Raises: DataError naming the argument that gives none.
    """
    found = list[Path]()
    for argument in arguments:
        if argument == "-":
            paths = [Path(line.rstrip("\n")) for line in sys.stdin if line.strip()]
        elif Path(argument).is_dir():
            paths = images_below(Path(argument))
        elif Path(argument).exists():
            paths = [Path(argument)]
        else:
            matches = sorted(glob.glob(argument, recursive=True))  # noqa: PTH207 - the pattern may be absolute
            paths = [Path(match) for match in matches if _is_picture(match)]
        if not paths:
            raise DataError(
                f"{argument}: no picture found. Give files, folders, patterns, or - for paths from the input."
            )
        found += paths
    if not found:
        raise DataError("No picture was named. Give files, folders, patterns, or - for paths from the input.")
    return found


def _holds_classes(folder: Path) -> bool:
    """Return whether a folder is a part, with classes below, rather than a class of that name, with pictures in it."""
    loose = any(_is_picture(entry.name) and entry.is_file() for entry in folder.iterdir())
    return bool(_subfolders(folder)) and not loose


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _is_picture(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not Path(name).name.startswith(".")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
