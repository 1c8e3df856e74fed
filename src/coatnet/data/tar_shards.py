"""Which tar files are meant, and which part of the data each holds.

A folder of shards, a shard, a pattern with wildcards, or one with WebDataset's braces: "train-{000..146}.tar".
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from coatnet.data.folders import PARTS, images_below
from coatnet.errors import ConfigError, DataError

COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")


class Shard(NamedTuple):
    """A tar file as it was found: another size or time means another content."""

    path: Path
    name: str  # relative to the folder of all shards, with /
    num_bytes: int
    mtime_ns: int


class Shards(NamedTuple):
    """The shards of each part, and the folder they all lie below."""

    folder: Path
    parts: Mapping[str, Sequence[Shard]]


def find_shards(data: str) -> Shards | None:
    """Return the shards that a folder or pattern means, None where it is about something else.

    Parts are told by a folder train/, val/ or test/, or by that word in a shard's name; a pattern for one part's shards
    means these alone.

    Raises: DataError for shards that cannot be used; ConfigError where the webdataset package is missed.
    """
    if Path(data).is_dir():
        folder, files = Path(data), _shards_in(Path(data))
        if not files:
            return None
    elif data.endswith((".tar", *COMPRESSED)):
        files = _matching(data)
        folder = Path(os.path.commonpath([file.parent.absolute() for file in files]))
    else:
        return None
    files = [Path(os.path.abspath(file)) for file in files]  # noqa: PTH100 - symbolic links keep their names
    folder = Path(os.path.abspath(folder))  # noqa: PTH100
    if packed := [file for file in files if file.name.endswith(COMPRESSED)]:
        raise DataError(f"{packed[0]} is compressed, so no place in it can be gone to. Unpack it to a plain .tar.")
    names = sorted((file.relative_to(folder).as_posix(), file) for file in files)
    parts = _divide(data, {name: _part_of(name) for name, _ in names}, is_pattern=not Path(data).is_dir())
    found = {name: Shard(file, name, (stat := file.stat()).st_size, stat.st_mtime_ns) for name, file in names}
    return Shards(folder, {part: [found[name] for name in names] for part, names in parts.items()})


def _shards_in(folder: Path) -> list[Path]:
    """Return the tar files of a folder and of its parts' folders; none where pictures lie in folders beside them."""
    inside = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
    subfolders = [entry for entry in inside if entry.is_dir()]
    parts = [entry for entry in subfolders if entry.name.casefold() in PARTS]
    files = [file for file in (*inside, *(file for part in parts for file in part.iterdir())) if _is_shard(file)]
    return [] if files and any(images_below(subfolder) for subfolder in subfolders) else files


def _is_shard(file: Path) -> bool:
    return file.name.endswith((".tar", *COMPRESSED)) and not file.name.startswith(".") and file.is_file()


def _matching(pattern: str) -> list[Path]:
    """Return the files of a pattern. Raises: DataError for one that is not there, or lies on a server."""
    files = list[Path]()
    for place in _expanded(pattern):
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", place):  # one letter and a colon are a drive
            raise DataError(f"{place} is no file. Copy the shards to a disk first: pictures are read in any order.")
        matches = [place]
        if glob.has_magic(place) and not Path(place).exists():
            matches = sorted(glob.glob(place))  # noqa: PTH207 - the pattern may be absolute
        if not matches or not all(Path(match).is_file() for match in matches):
            raise DataError(f"{place} is not there. Give shards that are, like 'data/train-{{000..009}}.tar'.")
        files += map(Path, matches)
    if len(set(files)) < len(files):
        raise DataError(f"{pattern} names a shard twice. Name each once.")
    return files


def _expanded(pattern: str) -> list[str]:
    """Expand braces and "::" as WebDataset does."""
    if "{" not in pattern and "::" not in pattern:
        return [pattern]
    try:
        from webdataset.shardlists import expand_urls
    except ImportError:
        raise missing_webdataset(pattern) from None
    try:
        return expand_urls(pattern)
    except (ValueError, AssertionError) as error:  # braces at odds; a variable of the environment that is not set
        raise DataError(f"{pattern}: its braces cannot be read ({error}). Give them like {{000..009}}.") from None


def missing_webdataset(data: str | Path) -> ConfigError:
    """Return the error that says what to install."""
    return ConfigError(f"{data} takes the webdataset package, which is not here: pip install 'coatnet[webdataset]'")


def _part_of(name: str) -> str | None:
    """Return the part that a shard's folder or name tells. Raises: DataError where it tells two."""
    folder, _, file = name.rpartition("/")
    if folder.casefold() in PARTS:
        return PARTS[folder.casefold()]
    told = {PARTS[word] for word in re.findall(r"[a-z]+", file.removesuffix(".tar").casefold()) if word in PARTS}
    if len(told) > 1:
        raise DataError(f"{name} tells two parts, {' and '.join(sorted(told))}. Name it after one, or put it into one.")
    return next(iter(told), None)


def _divide(data: str, part_of: Mapping[str, str | None], *, is_pattern: bool) -> dict[str, list[str]]:
    """Return the shards' names by part. Raises: DataError where a shard belongs to none, or none to train."""
    parts: dict[str | None, list[str]] = {}
    for name, part in part_of.items():
        parts.setdefault(part, []).append(name)
    if len(parts) == 1 and (is_pattern or None in parts):
        return {"train": list(part_of)}
    told = {part: names for part, names in parts.items() if part is not None}
    if None in parts:
        first = parts[None][0]
        raise DataError(
            f"{data} has shards of {', '.join(told)} and beside them {first}. Name it train-..., or move it."
        )
    if "train" not in told:
        only = f"{next(iter(told))}-*.tar"
        raise DataError(f"{data} has shards of {', '.join(told)} but none of train. Give one part's: '{data}/{only}'.")
    return told


def shards_name(pattern: str) -> str:
    """Return what to call the data of a pattern: "train" for "data/train-{000..146}.tar"."""
    path = Path(pattern).absolute()
    stem = re.split(r"[{*?\[:]", path.name)[0].removesuffix(".tar").rstrip("-_.")
    return stem or path.parent.name
