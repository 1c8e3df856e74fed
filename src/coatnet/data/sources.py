"""Where labelled pictures come from, divided into train, val and test: folders of classes, tar shards, tables, by name.

What `open_data` divides itself it records in `DataSet.split`, so that a resumed or evaluated run divides alike.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coatnet.data import draws, fashion_mnist
from coatnet.data.digits import open_digits
from coatnet.data.folders import images_below, labelled_folder, list_images, open_folder
from coatnet.data.hub import holds_tables, open_table, table_name
from coatnet.data.image_sets import ArrayImages, FolderImages, ImageSet
from coatnet.data.letters import LetterImages, open_letters
from coatnet.data.splits import Split, follow, hold_out, keep, names_of
from coatnet.data.tar_images import open_tars
from coatnet.data.tar_shards import find_shards, shards_name
from coatnet.errors import BadImageError, DataError, one_line

__all__ = [
    "DATA_SETS", "TABLE_PREFIX", "ArrayImages", "DataSet", "FolderImages", "ImageSet", "Split", "fingerprint",
    "images_below", "labelled_folder", "list_images", "measure", "name_of", "open_data",
]  # fmt: skip

DATA_SETS = ("fashion-mnist", "digits", "letters")  # letters:N has N pictures for training
TABLE_PREFIX = "hf:"  # before a name on Hugging Face's hub, or a folder that its library reads


@dataclass(frozen=True)
class DataSet:
    """Pictures for training, those set apart for choosing (val), and those for the last word (test)."""

    name: str
    train: ImageSet
    val: ImageSet | None
    test: ImageSet | None
    class_names: tuple[str, ...]
    split: Split | None  # names of "train" and "val"; absent where the folder itself is divided


def open_data(
    data: str | Path,
    *,
    seed: int = 0,
    holdout_percent: float | None = 10.0,
    train_percent: float | None = None,
    split: Split | None = None,
) -> DataSet:
    """Open pictures by folder, pattern or name; where they have no val part, set one aside from train, class by class.

    Of what is left for training, `train_percent` is kept. The `split` of an earlier run is followed instead of drawing.

    Raises: DataError for whatever makes the data unusable.
    """
    parts = _open_parts(data)
    train, val = parts["train"], parts.get("val")
    if val is not None and split is not None:
        raise DataError(f"{data} has a val part now and had none when the run began. Move it away to go on.")
    is_drawn = split is None  # else it names what was kept
    if val is None:
        split = split or hold_out(train, seed, holdout_percent)
        train, val = follow(train, split, str(data))
    if is_drawn and train_percent is not None:
        train = keep(train, seed, train_percent)
        split = {**split, "train": names_of(train)} if split else None
    return DataSet(str(data), train, val, parts.get("test"), train.class_names, split)


def _open_parts(data: str | Path) -> Mapping[str, ImageSet]:
    text = str(data)
    if text.partition(":")[0] in DATA_SETS and not Path(text).is_dir():
        return _open_named(text)
    if text.startswith(TABLE_PREFIX):
        return open_table(text.removeprefix(TABLE_PREFIX))
    if shards := find_shards(text):
        return open_tars(shards)
    if Path(text).is_dir() and holds_tables(Path(text)):
        return open_table(text)
    return open_folder(Path(data))


def _open_named(text: str) -> Mapping[str, ImageSet]:
    name, colon, number = text.partition(":")
    if colon and not (name == "letters" and number.isascii() and number.isdigit()):
        raise DataError(f"{one_line(text)} is no data set. Give {', '.join(DATA_SETS)}, or letters:N for N pictures.")
    if name == "letters":
        return open_letters(int(number)) if colon else open_letters()
    if name == "digits":
        return open_digits()
    folder = fashion_mnist.find()
    return {part: fashion_mnist.images(folder, part) for part in ("train", "test")}


def fingerprint(data: DataSet) -> str:
    """Return the SHA-256 of what the data set lists: names and classes of all pictures, sizes of files, fonts drawn."""
    digest = hashlib.sha256(json.dumps(data.class_names).encode())
    for part, images in (("train", data.train), ("val", data.val), ("test", data.test)):
        if images is None:
            continue
        if isinstance(images, LetterImages):
            digest.update(images.key.encode())
        for index, target in enumerate(images.targets.tolist()):
            size = images.path(index).stat().st_size if isinstance(images, FolderImages) else 0
            digest.update(f"{part}\t{images.name(index)}\t{target}\t{size}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def name_of(data: str) -> str:
    """Return a short name for what `open_data` takes, to call a run or a report after."""
    if data.startswith(TABLE_PREFIX):
        return table_name(data.removeprefix(TABLE_PREFIX))
    if data.partition(":")[0] in DATA_SETS:
        return data.replace(":", "-")
    return shards_name(data) if data.endswith(".tar") else Path(data).resolve().name


def measure(images: ImageSet, *, limit: int = 200, seed: int = 0) -> tuple[int, int]:
    """Return the median (height, width) in px of at most `limit` pictures, drawn by seed, without decoding them.

    Raises: DataError if none of them can be read.
    """
    sizes = list[tuple[int, int]]()
    for index in draws.permutation(seed, 0, len(images))[:limit].tolist():
        try:
            sizes.append(images.size(index))
        except BadImageError:
            continue
    if not sizes:
        raise DataError(f"None of {min(limit, len(images))} pictures looked at can be read. Is it the right folder?")
    height, width = np.median(np.array(sizes), axis=0).astype(int).tolist()
    return height, width
