"""Every labelled picture of WebDataset shards by its place, read once from the headers and kept for the next time.

A sample is what shares a name up to the first dot: 0001.jpg with 0001.cls, say. Its class is the number in .cls, else
"label" in .json, else the line in .txt, else the folder it lies in. Grouping and labels are WebDataset's own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from coatnet.data.classes import MAX_CLASSES
from coatnet.data.decode import SUFFIXES
from coatnet.data.draws import IntArray
from coatnet.data.packed_names import PackedNames
from coatnet.data.tar_headers import TarMember, read_members
from coatnet.data.tar_shards import Shard, missing_webdataset
from coatnet.errors import DataError
from coatnet.files import private_cache, write_atomic

Told = Literal["cls", "json", "txt", "folder"]  # what told a class

FORMAT = 1  # of what is kept
MAX_LABEL_BYTES = 2**20

_PICTURES = tuple(suffix.removeprefix(".") for suffix in SUFFIXES)
_META = re.compile(r"__[^/]*__($|/)")  # members that WebDataset passes over
_LABELS: tuple[Told, ...] = ("cls", "json", "txt")


@dataclass(frozen=True)
class TarIndex:
    """N pictures in their shards' order; labels count in `label_names`, or are the numbers that were given."""

    shards: NDArray[np.int32]  # (N,) int32, index of the shard
    starts: IntArray  # (N,) int64, byte in it
    sizes: IntArray  # (N,) int64, bytes
    names: PackedNames  # shard/member
    labels: IntArray  # (N,) int64
    label_names: tuple[str, ...] | None


class _Entry(NamedTuple):
    name: str
    start: int
    size: int
    label: int | str
    told: Told


def open_index(shards: Sequence[Shard]) -> TarIndex:
    """Return the index of shards: the one that was kept, else a new one, kept where that is possible.

    Raises: DataError for shards that cannot be used; ConfigError where the webdataset package is missed.
    """
    seen = [(str(shard.path), shard.name, shard.num_bytes, shard.mtime_ns) for shard in shards]
    key = hashlib.sha256(json.dumps([FORMAT, seen]).encode()).hexdigest()
    try:
        file = private_cache("tar-index") / f"{key}.safetensors"
    except OSError:  # a home that nobody can write to
        return _build(shards)
    with contextlib.suppress(OSError, SafetensorError, KeyError, ValueError):
        return _unpacked(load(file.read_bytes()))
    index = _build(shards)
    with contextlib.suppress(OSError):
        write_atomic(file, save(_packed(index)))
    return index


def _packed(index: TarIndex) -> dict[str, NDArray[Any]]:
    labels = PackedNames.of(index.label_names or ())
    return {
        "shards": index.shards, "starts": index.starts, "sizes": index.sizes, "labels": index.labels,
        "names": index.names.content, "name_ends": index.names.ends,
        "label_names": labels.content, "label_name_ends": labels.ends,
    }  # fmt: skip


def _unpacked(kept: dict[str, NDArray[Any]]) -> TarIndex:
    labels = PackedNames(kept["label_names"], kept["label_name_ends"])
    return TarIndex(
        shards=kept["shards"],
        starts=kept["starts"],
        sizes=kept["sizes"],
        names=PackedNames(kept["names"], kept["name_ends"]),
        labels=kept["labels"],
        label_names=tuple(labels[index] for index in range(len(labels))) or None,
    )


def _build(shards: Sequence[Shard]) -> TarIndex:
    """Read every shard's headers and labels."""
    growing = _Growing()
    for number, shard in enumerate(shards):
        for entry in _read_shard(shard):
            growing.add(number, entry)
    if not growing.starts:
        raise DataError(
            f"{shards[0].path} and the shards beside it hold no labelled picture, such as 0001.jpg with 0001.cls. "
            "A picture's name goes up to its first dot."
        )
    return growing.index()


class _Growing:
    """An index under way, in arrays: as Python's objects its entries would take ten times the memory."""

    def __init__(self) -> None:
        self.shards, self.starts, self.sizes, self.ends, self.labels = (array("q") for _ in range(5))
        self.names = bytearray()
        self.number_of: dict[str, int] = {}  # name of a class -> in which order it was met
        self.first: _Entry | None = None

    def add(self, shard: int, entry: _Entry) -> None:
        """Add a picture. Raises: DataError if its label is not of the first one's kind."""
        self.first = first = self.first or entry
        if entry.told != first.told or type(entry.label) is not type(first.label):
            raise DataError(
                f"Labels must be told alike, but {first.name} has {first.label!r} by its {first.told}, {entry.name} "
                f"{entry.label!r} by its {entry.told}. Add what is missing, or take it out."
            )
        self.shards.append(shard)
        self.starts.append(entry.start)
        self.sizes.append(entry.size)
        self.names += entry.name.encode(errors="surrogateescape")
        self.ends.append(len(self.names))
        label = entry.label
        self.labels.append(label if isinstance(label, int) else self.number_of.setdefault(label, len(self.number_of)))

    def index(self) -> TarIndex:
        """Return the index, its names of classes sorted."""
        labels = np.array(self.labels, dtype=np.int64)
        names = sorted(self.number_of)
        if names:
            place = {name: index for index, name in enumerate(names)}
            labels = np.array([place[name] for name in self.number_of], dtype=np.int64)[labels]
        return TarIndex(
            shards=np.array(self.shards, dtype=np.int32),
            starts=np.array(self.starts, dtype=np.int64),
            sizes=np.array(self.sizes, dtype=np.int64),
            names=PackedNames(np.frombuffer(bytes(self.names), dtype=np.uint8), np.array(self.ends, dtype=np.int64)),
            labels=labels,
            label_names=tuple(names) or None,
        )


def _read_shard(shard: Shard) -> list[_Entry]:
    """Return the pictures of a shard. Raises: DataError, in a line, for whatever is wrong with it."""
    try:
        from webdataset.tariterators import group_by_keys
    except ImportError:
        raise missing_webdataset(shard.path) from None
    try:
        with shard.path.open("rb") as file:
            samples = group_by_keys(
                {"fname": name, "data": content, "__url__": shard.name} for name, content in _contents(file, shard)
            )
            entries = [entry for sample in samples if (entry := _entry(sample, shard))]
    except (ValueError, OSError) as error:
        said = error.strerror if isinstance(error, OSError) and error.strerror else error.args[0]
        raise DataError(f"{shard.path}: {said}. Pack it again, or take it away.") from None
    if len({entry.name for entry in entries}) < len(entries):
        names = sorted(entry.name for entry in entries)
        twice = next(name for name, following in pairwise(names) if name == following)
        raise DataError(f"{shard.path} holds {twice} twice. Pack it again.")
    return entries


def _contents(file: BinaryIO, shard: Shard) -> Iterator[tuple[str, TarMember | bytes]]:
    """Yield the plain files: a label's name with its bytes, any other with its place.

    Raises: ValueError for a picture that is a link or the like, and for too long a label.
    """
    from webdataset.tariterators import base_plus_ext

    for member in read_members(file, shard.num_bytes):
        if member.kind == "other" and member.name.lower().endswith(SUFFIXES):
            raise ValueError(f"{member.name} is a link or a device, which is not followed: pack it with --dereference")
        if member.kind != "file" or _META.match(member.name):
            continue
        _, ending = base_plus_ext(member.name)
        if ending is None or ending.lower() not in _LABELS:
            yield member.name, member
            continue
        if member.size > MAX_LABEL_BYTES:
            raise ValueError(f"{member.name} has {member.size} bytes, a label {MAX_LABEL_BYTES} at most")
        file.seek(member.start)
        yield member.name, file.read(member.size)


def _entry(sample: dict[str, Any], shard: Shard) -> _Entry | None:
    """Return a sample's picture and label; None for one without a picture. Raises: ValueError."""
    found = [ending for ending in _PICTURES if ending in sample]
    if len(found) > 1:
        raise ValueError(f"{sample['__key__']} has two pictures, .{found[0]} and .{found[1]}: leave one")
    if not found:
        return None
    picture: TarMember = sample[found[0]]
    label, told = _label(sample)
    return _Entry(f"{shard.name}/{picture.name.removeprefix('./')}", picture.start, picture.size, label, told)


def _label(sample: dict[str, Any]) -> tuple[int | str, Told]:
    """Return a sample's class, and what told it. Raises: ValueError."""
    key = str(sample["__key__"])
    for told in _LABELS:
        if told not in sample:
            continue
        label = _decoded(told, sample[told], key)
        if told == "json":
            label = label.get("label") if isinstance(label, dict) else None
            if label is None:
                continue
        if isinstance(label, str) and (name := label.strip()) and name.isprintable():
            return name, told
        if isinstance(label, int) and not isinstance(label, bool) and 0 <= label < MAX_CLASSES:
            return label, told
        shown = repr(label) if len(repr(label)) < 50 else repr(label)[:50] + "..."
        raise ValueError(f"the label of {key} is {shown}: give a number from 0 on, or a name in one line")
    folder = key.rpartition("/")[0].rpartition("/")[2]
    if folder in ("", ".", ".."):
        raise ValueError(f"{key} has no label: add {key}.cls, or put it into a folder named after its class")
    return folder, "folder"


def _decoded(told: str, content: bytes, key: str) -> Any:
    """Return what a label's file says, as WebDataset reads it."""
    from webdataset.autodecode import basichandlers

    try:
        return basichandlers(told, content)
    except (ValueError, RecursionError):
        raise ValueError(f"{key}.{told} cannot be read") from None
