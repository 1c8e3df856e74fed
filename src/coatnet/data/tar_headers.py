"""What lies where in a tar file: the name of each member, its kind, and the place of its content.

Nothing is extracted or followed, so a name is a name and no more. Python's own tarfile believes what a header claims:
it builds sparse maps of any length, sizes below zero send it back, and it takes more than twice as long.

Source: POSIX.1-2017, pax, "ustar Interchange Format" and "pax Extended Header"; GNU tar's manual, "Basic Tar Format".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO, Literal, NamedTuple

BLOCK = 512  # bytes; headers take one, contents are padded to whole ones
MAX_EXTENSION_BYTES = 2**16  # of a header that holds a long name
MAX_NAME_BYTES = 4096  # what Linux takes for a path

_END = bytes(BLOCK)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


class TarMember(NamedTuple):
    """One member; its content is the `size` bytes from `start` on."""

    name: str
    kind: Literal["file", "folder", "other"]  # "other": links, devices and what else has no content of its own
    start: int
    size: int


def read_members(file: BinaryIO, num_bytes: int) -> Iterator[TarMember]:
    """Yield the members of a file of so many bytes, in its order.

    Raises: ValueError, saying in words what is wrong, for what is no tar file, damaged, cut short, or sparse.
    """
    place = 0
    path, length = b"", -1  # what an extension says of the next member
    while (header := _read(file, place, BLOCK)) != _END:
        _check_sum(header, place)
        kind, size, start = header[156:157], _number(header[124:136]), place + BLOCK
        if kind in b"LKxgX":
            if size > MAX_EXTENSION_BYTES:
                raise ValueError(f"the header at byte {place} claims {size} bytes of names")
            content = _read(file, start, size)
            if kind == b"L":
                path = content.split(b"\0")[0]
            elif kind in b"xX":
                path, length = _pax(content, path, length)
        else:
            member = _member(header, kind, path, size if length < 0 else length, start)
            size = member.size
            if start + size > num_bytes:
                raise ValueError(f"{member.name} ends at byte {start + size}, the file at {num_bytes}: it is cut short")
            yield member
            path, length = b"", -1
        place = start + -(-size // BLOCK) * BLOCK


def _member(header: bytes, kind: bytes, path: bytes, size: int, start: int) -> TarMember:
    raw = path or _text(header[:100])
    if not path and header[257:263] == b"ustar\0" and (prefix := _text(header[345:500])):
        raw = prefix + b"/" + raw
    if len(raw) > MAX_NAME_BYTES:
        raise ValueError(f"the name at byte {start - BLOCK} has {len(raw)} bytes")
    name = raw.decode(errors="surrogateescape")
    if _CONTROL.search(name):
        raise ValueError(f"the name {name!r} holds control characters")
    if kind == b"S":
        raise ValueError(f"{name} is stored with holes (sparse): pack it without --sparse")
    if kind == b"5" or (kind in b"0\0" and name.endswith("/")):
        return TarMember(name, "folder", start, 0)
    if kind in b"12346":
        return TarMember(name, "other", start, 0)
    return TarMember(name, "file" if kind in b"0\x007" else "other", start, size)


def _pax(content: bytes, path: bytes, length: int) -> tuple[bytes, int]:
    """Return path and size as an extended header says; each record is "LENGTH KEY=VALUE\\n"."""
    place = 0
    while place < len(content):
        digits, _, rest = content[place : place + 20].partition(b" ")
        if not (rest and digits.isdigit()):
            raise ValueError("an extended header is damaged")
        end = place + int(digits)
        key, _, value = content[place + len(digits) + 1 : end - 1].partition(b"=")
        if end <= place + len(digits) or content[end - 1 : end] != b"\n":
            raise ValueError("an extended header is damaged")
        if key == b"path":
            path = value
        elif key == b"size":
            if not value.isdigit():
                raise ValueError(f"an extended header gives the size {value[:20]!r}")
            length = int(value[:20])
        elif key.startswith(b"GNU.sparse."):
            raise ValueError("a member is stored with holes (sparse): pack it without --sparse")
        place = end
    return path, length


def _read(file: BinaryIO, place: int, num_bytes: int) -> bytes:
    file.seek(place)
    content = file.read(num_bytes)
    if len(content) < num_bytes:
        raise ValueError(f"it ends at byte {place + len(content)} without an end mark: it is cut short")
    return content


def _check_sum(header: bytes, place: int) -> None:
    """Hold a header to its checksum; some old programs added the bytes up as signed ones."""
    field, rest = _text(header[148:156]).strip(), header[:148] + b" " * 8 + header[156:]
    want = int(field, 8) if field and not field.strip(b"01234567") else -1
    if sum(rest) != want and sum(rest) - 256 * sum(byte > 127 for byte in rest) != want:
        raise ValueError(f"the header at byte {place} is damaged" if place else "it is no tar file")


def _number(field: bytes) -> int:
    """Read a number: octal digits, or big-endian after a byte 0x80."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = _text(field).strip()
    if digits.strip(b"01234567"):
        raise ValueError(f"a header holds {field!r} where a number should be")
    return int(digits or b"0", 8)


def _text(field: bytes) -> bytes:
    return field.split(b"\0", 1)[0]
