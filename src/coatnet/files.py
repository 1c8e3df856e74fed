"""Files and folders that are whole or not there: written aside, synced, renamed, and listed with their SHA-256."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PureWindowsPath
from typing import Any

from coatnet.errors import ModelFileError, brief, one_line

MANIFEST = "manifest.json"
MAX_JSON_BYTES = 64 * 2**20


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file as hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Have the file's or folder's bytes on the disk before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    aside.write_bytes(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
    _sync(aside)
    aside.replace(path)
    _sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, two spaces deep, keys in the order given."""
    write_atomic(path, _to_json(value))


def _to_json(value: Any) -> str:
    return json.dumps(value, indent=2) + "\n"


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises: ModelFileError if it is missing, too large or no JSON."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"it is larger than {MAX_JSON_BYTES // 2**20} MiB")
        return parse_json(path.read_bytes().decode())
    except FileNotFoundError:
        raise ModelFileError(f"{path} is not there.") from None
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path} cannot be read as JSON: {error}.") from None


def write_manifest(folder: Path, names: Sequence[str], manifest: str = MANIFEST) -> None:
    """Write the SHA-256 of these files of a folder, for `verify_folder`."""
    write_json(folder / manifest, {"sha256": {name: sha256_of(folder / name) for name in names}})


def recover(parent: Path, pattern: str) -> None:
    """Put back the folders that a kill between two renames of `new_folder` left aside."""
    for old in parent.glob(f".{pattern}.*.old"):
        name = old.name[1:].rsplit(".", 2)[0]
        if not (parent / name).exists():
            with suppress(OSError):  # of a disk that is only to be read
                old.rename(parent / name)


def parse_json(text: str) -> Any:
    """Parse JSON. Raises: ValueError for what is none, and for what readers may take differently or choke on.

    That is a key that comes twice, and lists in lists without end.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"the key {brief(name)} comes twice")
        values[name] = value
    return values


@contextmanager
def new_folder(path: Path) -> Generator[Path]:
    """Yield a folder to fill; then give it a manifest, sync it and rename it to `path`, replacing what was there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        names = sorted(file.relative_to(aside).as_posix() for file in aside.rglob("*") if file.is_file())
        for name in names:
            _sync(aside / name)
        write_manifest(aside, names)
        old = path.with_name(f".{path.name}.{os.getpid()}.old")
        if path.exists():
            path.rename(old)
        try:
            aside.rename(path)
        except BaseException:  # Ctrl-C between the two renames too: put back what was there
            if old.exists() and not path.exists():
                old.rename(path)
            raise
        _sync(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def verify_folder(path: Path, needed: Iterable[str], manifest: str = MANIFEST) -> None:
    """Check every file of a folder against its manifest, which must list those needed.

    Raises: ModelFileError naming the first file that is missing or was changed, the manifest itself included, or that
    lies outside the folder.
    """
    hashes = _read_manifest(path / manifest)
    unlisted = [name for name in needed if name not in hashes]
    if unlisted:  # else a manifest that lost a line would vouch for anything
        raise ModelFileError(f"{path}: {manifest} does not list {unlisted[0]}. Copy the folder again.")
    for name, want in hashes.items():
        if not _stays_inside(name):
            raise ModelFileError(f"{path}: {manifest} lists {brief(name)}, which is not in the folder. Do not use it.")
        try:
            met = sha256_of(path / name) if (path / name).is_file() else None
        except OSError as error:
            raise ModelFileError(f"{path}: {one_line(name)} cannot be read ({error.strerror}).") from None
        if met is None:
            raise ModelFileError(f"{path}: {one_line(name)} is missing. Copy the folder again, whole.")
        if met != want:
            raise ModelFileError(
                f"{path}: {one_line(name)} is damaged (its SHA-256 is not the manifest's). Copy the folder again."
            )


def _read_manifest(path: Path) -> dict[str, str]:
    """Return the SHA-256 of each file that a manifest lists; it must have the very bytes that were written."""
    manifest = read_json(path)
    hashes = manifest.get("sha256") if isinstance(manifest, dict) else None
    if not isinstance(hashes, dict) or not hashes or not all(isinstance(value, str) for value in hashes.values()):
        raise ModelFileError(f"{path} is damaged (it lists no files). Copy the folder again.")
    if path.read_bytes() != _to_json({"sha256": hashes}).encode():
        raise ModelFileError(f"{path} is damaged (it is not as it was written). Copy the folder again.")
    return hashes


def _stays_inside(name: str) -> bool:
    """Return whether a file's name leads to a place below its folder, on any system."""
    place = PureWindowsPath(name)  # knows both slashes, and drives
    return not place.anchor and ".." not in place.parts


def private_cache(name: str) -> Path:
    """Return a folder for what can be made again, that no other user can write to; made where it is not there.

    Raises: OSError if it belongs to somebody else, or cannot be made or written to.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or Path.home() / ".cache"
    folder = Path(base) / "coatnet" / name
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "getuid"):
        found = folder.stat()
        if found.st_uid != os.getuid():
            raise OSError(f"{folder} belongs to another user. Set XDG_CACHE_HOME to a folder of your own.")
        if stat.S_IMODE(found.st_mode) != 0o700:
            folder.chmod(0o700)
    if not os.access(folder, os.W_OK):
        raise OSError(f"{folder} cannot be written to")
    return folder
