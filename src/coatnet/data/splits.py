"""Setting pictures aside for validation, and doing it again the same way."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from coatnet.data.image_sets import ImageSet
from coatnet.errors import DataError

Split = Mapping[str, Sequence[str]]  # "train" and "val" -> names of pictures


def hold_out(images: ImageSet, seed: int, percent: float | None) -> dict[str, list[str]]:
    """Divide by class: `percent` of each to val, at least one of two pictures or more, never all.

    Seed and name alone decide which, so pictures that are added later leave nearly all others where they were.
    """
    names = names_of(images)
    if percent is None:
        return {"train": names, "val": []}
    held = set[str]()
    for target in range(len(images.class_names)):
        members = [names[index] for index in np.flatnonzero(images.targets == target).tolist()]
        num_held = min(max(1, round(len(members) * percent / 100)), len(members) - 1)
        held.update(sorted(members, key=lambda name: _rank(seed, name))[: max(0, num_held)])
    return {
        "train": [name for name in names if name not in held],
        "val": [name for name in names if name in held],
    }


def keep(images: ImageSet, seed: int, percent: float) -> ImageSet:
    """Return `percent` of each class, at least one picture, in their order.

    Seed and name alone decide which, and what a smaller share keeps a larger one keeps too.
    """
    kept = list[int]()
    for target in range(len(images.class_names)):
        members = np.flatnonzero(images.targets == target).tolist()
        num_kept = max(1, round(len(members) * percent / 100))
        kept += sorted(members, key=lambda index: _rank(seed, images.name(index)))[:num_kept]
    return images.take(np.array(sorted(kept), dtype=np.int64))


def names_of(images: ImageSet) -> list[str]:
    """Return what all pictures are called, in their order."""
    return [images.name(index) for index in range(len(images))]


def _rank(seed: int, name: str) -> bytes:
    return hashlib.sha256(f"{seed}/{name}".encode(errors="surrogateescape")).digest()


def follow(images: ImageSet, split: Split, data: str) -> tuple[ImageSet, ImageSet | None]:
    """Divide as a split says; pictures that it does not name are left out.

    Raises: DataError if a picture is gone, or the split is none.
    """
    index_of = {images.name(index): index for index in range(len(images))}
    parts = list[ImageSet]()
    for part in ("train", "val"):
        names = split.get(part)
        if names is None:
            raise DataError(f"The split of {data} has no '{part}'. It must list the names of 'train' and 'val'.")
        if gone := [name for name in names if name not in index_of]:
            raise DataError(f"{data}: {gone[0]} is gone, one of {len(gone)} of the split's pictures. Put them back.")
        parts.append(images.take(np.array([index_of[name] for name in names], dtype=np.int64)))
    return parts[0], parts[1] if len(parts[1]) else None
