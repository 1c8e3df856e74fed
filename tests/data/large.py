"""Shards and tables of the pictures of a folder of classes, as WebDataset's and Hugging Face's users have them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import datasets
import webdataset


def pictures_of(folder: Path) -> tuple[list[Path], list[str]]:
    """Return the pictures in the order of a folder's own set, and the classes."""
    return sorted(folder.rglob("*.png")), sorted(entry.name for entry in folder.iterdir())


def write_shards(folder: Path, out: Path, *, part: str = "train", per_shard: int = 7) -> Path:
    """Write out/part-000.tar and on, of 00000.png with 00000.cls, and classes.txt beside them."""
    files, classes = pictures_of(folder)
    out.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, len(files), per_shard)):
        write_shard(
            out / f"{part}-{number:03d}.tar",
            [
                {"__key__": f"{start + place:05d}", "png": file.read_bytes(), "cls": classes.index(file.parent.name)}
                for place, file in enumerate(files[start : start + per_shard])
            ],
        )
    (out / "classes.txt").write_text("\n".join(classes) + "\n")
    return out


def write_shard(path: Path, samples: Sequence[dict]) -> Path:
    """Write a shard by WebDataset's own writer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path), encoder=True) as writer:
        for sample in samples:
            writer.write(sample)
    return path


def write_table(folder: Path, out: Path, *, split: str = "train") -> Path:
    """Write out/data/split-00000-of-00001.parquet with the columns image and label."""
    files, classes = pictures_of(folder)
    table = datasets.Dataset.from_dict(
        {
            "image": [{"bytes": file.read_bytes(), "path": file.name} for file in files],
            "label": [classes.index(file.parent.name) for file in files],
        },
        features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)}),
    )
    (out / "data").mkdir(parents=True, exist_ok=True)
    table.to_parquet(out / "data" / f"{split}-00000-of-00001.parquet")
    return out
