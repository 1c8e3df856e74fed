"""Tables of pictures through Hugging Face's datasets: parquet files in a folder, or a data set of the hub by its name.

Their rows lie in Arrow files that are mapped into memory, so any row can be read at once, as any file of a folder can.
Streams, which have no rows to go to, are not taken. Pictures are decoded here and never by the library.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from coatnet.data.classes import MAX_CLASSES, class_names_of, to_classes
from coatnet.data.draws import IntArray
from coatnet.data.folders import PARTS, images_below
from coatnet.data.table_images import TableImages
from coatnet.errors import ConfigError, DataError

_PICTURE_NAMES = ("image", "img")  # of columns that do not say what they are
_LABEL_NAMES = ("label", "labels", "cls")
_SPEC = re.compile(r"(?P<name>[^:@/]+(/[^:@/]+)?)(:(?P<subset>[^:@]+))?(@(?P<revision>[^:@]+))?")


def holds_tables(folder: Path) -> bool:
    """Return whether a folder holds parquet files rather than folders of pictures."""
    subfolders = [entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    places = [folder, *(entry for entry in subfolders if entry.name == "data" or entry.name.casefold() in PARTS)]
    return any(any(place.glob("*.parquet")) for place in places) and not images_below(folder)


def open_table(spec: str) -> dict[str, TableImages]:
    """Open a folder of parquet files, "owner/name" or "owner/name:subset@revision" -> the parts that have labels.

    Raises: DataError for what cannot be reached or used; ConfigError where the datasets package is missed.
    """
    tables, folders = _load(spec)
    splits = _splits(spec, tables)
    train = tables[splits["train"]]
    picture, label = _picture_column(spec, train), _label_column(spec, train)
    class_names: tuple[str, ...] | None = None
    opened: dict[str, TableImages] = {}
    for part in sorted(splits, key=lambda part: part != "train"):  # train first: it tells the classes
        split, table = splits[part], tables[splits[part]]
        told = _labels(f"{spec}, {split}", table, label)
        if told is None and part == "train":
            raise DataError(f"{spec}: no {label} is told in {split}. Give a set with labels.")
        if told is None:
            continue  # the test split of a contest
        class_names = class_names or class_names_of(*told, spec)
        opened[part] = TableImages(
            table=_undecoded(table, picture),
            column=picture,
            part=split,
            folders=folders,
            labels=to_classes(*told, class_names, f"{spec}, {split},"),
            class_names=class_names,
            rows=np.arange(len(table), dtype=np.int64),
        )
    return opened


def table_name(spec: str) -> str:
    """Return what to call a set: "name" for "owner/name:subset@revision"."""
    return Path(re.split("[:@]", spec)[0]).resolve().name


def _load(spec: str) -> tuple[dict[str, Any], tuple[Path, ...]]:
    """Return the table of each split, and the folders that pictures may lie in. Raises: DataError, ConfigError."""
    place, subset, revision = _place(spec)
    try:
        import datasets
        from datasets.config import HF_CACHE_HOME, HF_DATASETS_CACHE
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError:
        raise ConfigError(f"{spec} takes the datasets package, which is not here: pip install 'coatnet[hub]'") from None
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what others' packages warn of is not ours to mend
            found = datasets.load_dataset(place, name=subset, revision=revision)
    except Exception as error:
        raise DataError(_in_words(spec, error)) from None
    own = [place] if Path(place).is_dir() else []
    folders = [Path(folder).expanduser() for folder in (*own, HF_CACHE_HOME, HF_DATASETS_CACHE, HF_HUB_CACHE)]
    tables: dict[str, Any] = {str(split): table for split, table in found.items()}
    return tables, tuple(folder.resolve() for folder in folders)


def _place(spec: str) -> tuple[str, str | None, str | None]:
    """Return a folder, or a name with subset and revision where they are given. Raises: DataError."""
    if spec and Path(spec).is_dir():
        return str(Path(spec).resolve()), None, None
    met = _SPEC.fullmatch(spec)
    if met is None:
        raise DataError(f"'{spec}' is no name on the hub. Give hf:owner/name, or hf:owner/name:subset@revision.")
    return met["name"], met["subset"], met["revision"]


def _in_words(spec: str, error: Exception) -> str:
    """Say why a set cannot be opened, and what to do."""
    said = next(iter(str(error.__cause__ or error).splitlines()), type(error).__name__).rstrip(". ")
    if isinstance(error, ConnectionError):
        return f"{spec}: {said}. Fetch it once where there is a network, or give a folder of its parquet files."
    return f"{spec} cannot be opened: {said}."


def _splits(spec: str, tables: Mapping[str, Any]) -> dict[str, str]:
    """Return part -> split; a lone split is all there is, and others ("extra", "unsupervised") are passed over."""
    if len(tables) == 1:
        return {"train": next(iter(tables))}
    splits = {PARTS[split.casefold()]: split for split in tables if split.casefold() in PARTS}
    if "train" not in splits:
        raise DataError(f"{spec} has {', '.join(tables)} but no train. Give a set with a train split.")
    return splits


def _picture_column(spec: str, table: Any) -> str:
    """Return the one column of pictures, or that of the usual name. Raises: DataError."""
    kinds = {name: type(feature).__name__ for name, feature in table.features.items()}
    pictures = [name for name, kind in kinds.items() if kind == "Image"]
    for name in (*(pictures if len(pictures) == 1 else ()), *_PICTURE_NAMES):
        if name in kinds:
            return name
    raise DataError(f"{spec} has no column of pictures that stands out among {', '.join(kinds)}. Name it image.")


def _label_column(spec: str, table: Any) -> str:
    """Return the column of the usual name, or the finest of those that list their classes. Raises: DataError."""
    for name in _LABEL_NAMES:
        if name in table.features:
            return name
    counts = {name: len(kind.names) for name, kind in table.features.items() if hasattr(kind, "num_classes")}
    if not counts:
        raise DataError(f"{spec} has no column of labels among {', '.join(table.features)}. Name it label.")
    return max(counts, key=lambda name: counts[name])


def _labels(where: str, table: Any, column: str) -> tuple[IntArray, tuple[str, ...] | None] | None:
    """Return labels (N,) and the names they count in, if they have names; None where no row is labelled.

    Raises: DataError for a column of another kind, or with gaps.
    """
    feature, cells = table.features[column], table.data.column(column)
    kind = str(getattr(feature, "dtype", type(feature).__name__))
    if kind not in ("string", "large_string") and not re.fullmatch(r"u?int\d+", kind):
        raise DataError(f"{where}: {column} is of the kind {kind}. It must hold one name or number a picture.")
    if kind in ("string", "large_string"):
        coded = cells.combine_chunks().dictionary_encode()
        told, names = coded.indices.fill_null(-1).to_numpy(), tuple(coded.dictionary.to_pylist())
    else:
        try:
            told, names = cells.cast("int64").fill_null(-1).to_numpy(), getattr(feature, "names", None)
        except ValueError as error:  # beyond 64 bits
            raise DataError(f"{where}: {column} cannot be read: {error}") from None
        names = tuple(names) if names else None
    labels = told.astype(np.int64)
    num_untold = int((labels < 0).sum())
    if num_untold == len(labels):
        return None
    if num_untold or labels.max() >= (len(names) if names else MAX_CLASSES):
        raise DataError(f"{where}: {column} is {labels.min()} to {labels.max()}, with {num_untold} untold. Mend them.")
    if names and not hasattr(feature, "names"):  # they come in the order they were met
        place = {name: index for index, name in enumerate(sorted(names))}
        return np.array([place[name] for name in names], dtype=np.int64)[labels], tuple(place)
    return labels, names


def _undecoded(table: Any, column: str) -> Any:
    """Return the column of pictures alone, as bytes: the library would decode them with no limit."""
    import datasets

    alone = table.select_columns([column])
    is_picture = isinstance(table.features[column], datasets.Image)
    return alone.cast_column(column, datasets.Image(decode=False)) if is_picture else alone
