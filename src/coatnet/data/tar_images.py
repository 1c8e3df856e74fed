"""Labelled pictures in tar shards, read by place: as much a set of pictures as a folder is, with the same order."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coatnet.data.classes import MAX_CLASSES, class_names_of, to_classes
from coatnet.data.decode import MAX_FILE_BYTES, MinSide, Pixels, decode, read_size
from coatnet.data.draws import IntArray
from coatnet.data.image_sets import ShownRows
from coatnet.data.tar_index import TarIndex, open_index
from coatnet.data.tar_shards import Shard, Shards
from coatnet.errors import BadImageError, DataError


@dataclass(frozen=True)
class TarImages(ShownRows):
    """Pictures in shards, of which `rows` of the index are shown. It holds no open file: any process may read."""

    shards: tuple[Shard, ...]
    index: TarIndex
    labels: IntArray  # (M,) int64, the class of each picture of the index
    class_names: tuple[str, ...]
    rows: IntArray  # (N,) int64

    def name(self, index: int) -> str:
        return self.index.names[self.rows[index]]

    def size(self, index: int) -> tuple[int, int]:
        return read_size(self._content(index), name=self.name(index))

    def read(self, index: int, *, min_side: int | MinSide = 0) -> Pixels:
        return decode(self._content(index), name=self.name(index), min_side=min_side)

    def _content(self, index: int) -> bytes:
        """Return a picture's bytes. Raises: BadImageError."""
        row = self.rows[index]
        shard, num_bytes = self.shards[self.index.shards[row]], int(self.index.sizes[row])
        if num_bytes > MAX_FILE_BYTES:
            raise BadImageError(
                f"{self.name(index)}: {num_bytes / 2**20:.0f} MiB, at most {MAX_FILE_BYTES // 2**20} MiB are read."
            )
        try:
            with shard.path.open("rb") as file:
                stat = os.fstat(file.fileno())
                file.seek(int(self.index.starts[row]))
                content = file.read(num_bytes)
        except OSError as error:
            raise BadImageError(f"{self.name(index)}: cannot be read ({error.strerror}).") from None
        if (stat.st_size, stat.st_mtime_ns) != (shard.num_bytes, shard.mtime_ns):
            raise BadImageError(f"{self.name(index)}: {shard.name} has changed since it was looked at. Start again.")
        return content


def open_tars(shards: Shards) -> dict[str, TarImages]:
    """Open the parts of shards; the classes are those of train, or those that classes.txt or classes.json lists.

    Raises: DataError for no labelled picture, one class, or a part with classes that training lacks.
    """
    indices = {part: open_index(found) for part, found in shards.parts.items()}
    train = indices["train"]
    class_names = _listed_classes(shards.folder)
    if class_names is None:
        class_names = class_names_of(train.labels, train.label_names, str(shards.folder))
    return {
        part: TarImages(
            shards=tuple(shards.parts[part]),
            index=index,
            labels=to_classes(index.labels, index.label_names, class_names, f"{shards.folder}, {part},"),
            class_names=class_names,
            rows=np.arange(len(index.labels), dtype=np.int64),
        )
        for part, index in indices.items()
    }


def _listed_classes(folder: Path) -> tuple[str, ...] | None:
    """Return the names that classes.txt, one a line, or classes.json, a list, gives the classes 0, 1, ...

    Raises: DataError.
    """
    for file in (folder / "classes.txt", folder / "classes.json"):
        if not file.is_file():
            continue
        try:
            text = file.read_text()
            names = json.loads(text) if file.suffix == ".json" else [line.strip() for line in text.splitlines()]
        except (OSError, ValueError, RecursionError) as error:
            raise DataError(f"{file} cannot be read: {error}.") from None
        while isinstance(names, list) and names and names[-1] == "":
            names.pop()
        good = isinstance(names, list) and all(isinstance(name, str) and name for name in names)
        if not good or not 2 <= len(names) == len(set(names)) <= MAX_CLASSES:
            raise DataError(f"{file} must list two or more names, each once, in the order of their numbers.")
        return tuple(names)
    return None
