"""Headers are read as tarfile reads them where the file is sound, and refused in words where it is not."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coatnet.data.tar_headers import TarMember, read_members

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
NAMES = st.lists(st.text(st.characters(exclude_categories=["C"], exclude_characters="/\0"), min_size=1), min_size=1)


def members_of(content: bytes) -> list[TarMember]:
    return list(read_members(io.BytesIO(content), len(content)))


def tar_of(members: list[tuple[tarfile.TarInfo, bytes]], fmt: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=fmt) as tar:
        for info, content in members:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def info_of(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(NAMES, min_size=1, max_size=4), sizes=st.integers(0, 1500), fmt=st.sampled_from(["gnu", "pax"]))
def test_it_agrees_with_tarfile(parts: list[list[str]], sizes: int, fmt: str):
    written = [(info_of("/".join(names)), bytes([n % 251]) * (sizes + n)) for n, names in enumerate(parts)]
    content = tar_of(written, FORMATS[fmt])
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        want = [(info.name, info.offset_data, info.size) for info in tar]
    found = members_of(content)
    assert [(member.name, member.start, member.size) for member in found] == want
    for member, (_, data) in zip(found, written, strict=True):
        assert content[member.start : member.start + member.size] == data


@pytest.mark.parametrize("fmt", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_it_reads_what_gnu_tar_writes(fmt: str, tmp_path: Path):
    if shutil.which("tar") is None or b"GNU" not in subprocess.run(["tar", "--version"], capture_output=True).stdout:
        pytest.skip("no GNU tar")
    folder = tmp_path / "in" / ("d" * 50)
    folder.mkdir(parents=True)
    long = "long" * (9 if fmt == "v7" else 22)  # v7 has room for 99 characters of path
    for name in ("a.jpg", long + ".jpg"):
        (folder / name).write_bytes(name.encode() * 100)
    (folder / "link.jpg").symlink_to("a.jpg")
    subprocess.run(["tar", f"--format={fmt}", "-cf", tmp_path / "x.tar", "-C", tmp_path / "in", "."], check=True)
    with tarfile.open(tmp_path / "x.tar") as tar:
        want = {info.name: (info.offset_data, info.size) for info in tar if info.isreg()}
    found = members_of((tmp_path / "x.tar").read_bytes())
    files = {member.name: (member.start, member.size) for member in found if member.kind == "file"}
    assert files == want
    assert len(files) == 2, f"{fmt}: {files}"
    assert [Path(member.name).name for member in found if member.kind == "other"] == ["link.jpg"]


def header(name: bytes = b"a.jpg", size: bytes = b"00000000000", kind: bytes = b"0", rest: bytes = b"") -> bytes:
    """Return a header as a forger would write it: the checksum is right."""
    block = bytearray(512)
    block[: len(name)] = name
    block[124 : 124 + len(size)] = size
    block[156:157] = kind
    block[257 : 257 + len(rest)] = rest
    block[148:156] = b" " * 8
    block[148:155] = b"%06o\0" % sum(block)
    return bytes(block)


END = bytes(1024)
HOSTILE = {  # what a file holds -> what is said of it
    "nothing": (b"", "cut short"),
    "no tar": (b"<html>" * 200, "no tar file"),
    "a flipped bit": (header()[:200] + b"\1" + header()[201:] + END, "no tar file"),
    "no end mark": (header(), "without an end mark"),
    "a size beyond the file": (header(size=b"77777777777") + END, "it is cut short"),
    "a size of 2^88": (header(size=b"\x80" + b"\xff" * 11) + END, "it is cut short"),
    "a size below zero": (header(size=b"\xff" * 12) + END, "where a number should be"),
    "a signed size": (header(size=b"-0000000001") + END, "where a number should be"),
    "a sparse member": (header(kind=b"S") + END, "stored with holes"),
    "a sparse member of pax": (header(kind=b"x", size=b"00000000026") + b"22 GNU.sparse.major=1\n".ljust(512, b"\0"),
                               "stored with holes"),
    "a long name of 8 GiB": (header(kind=b"L", size=b"77777777777") + END, "bytes of names"),
    "a pax header of 2^60": (header(kind=b"x", size=b"\x80" + bytes(3) + b"\x10" + bytes(7)) + END, "bytes of names"),
    "a pax size below zero": (header(kind=b"x", size=b"00000000015") + b"13 size=-512\n".ljust(512, b"\0"),
                              "gives the size"),
    "a pax record of no length": (header(kind=b"x", size=b"00000000012") + b"0 path=a.b\n".ljust(512, b"\0"),
                                  "damaged"),
    "a pax record past its end": (header(kind=b"x", size=b"00000000012") + b"99 path=ab\n".ljust(512, b"\0"),
                                  "damaged"),
    "a name of 60,000 bytes": (header(kind=b"L", size=b"00000165140") + b"a" * 60000 + bytes(416) + header() + END,
                               "has 60000 bytes"),
    "a name with a line's end": (header(name=b"a\nb.jpg") + END, "control characters"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_what_is_hostile_or_damaged_is_refused_in_words(what: str):
    content, said = HOSTILE[what]
    with pytest.raises(ValueError, match=said) as met:
        members_of(content)
    assert "\n" not in str(met.value)


def test_a_name_is_only_a_name():
    """Absolute, climbing, drive: what it says is handed on, and means no place on the disk."""
    names = ["/etc/passwd", "../../up.jpg", "a/../../b.jpg", "C:\\x.jpg"]
    assert [member.name for member in members_of(tar_of([(info_of(name), b"x") for name in names]))] == names


def test_links_and_devices_have_no_content():
    kinds = {
        "hard": tarfile.LNKTYPE, "soft": tarfile.SYMTYPE, "chr": tarfile.CHRTYPE, "blk": tarfile.BLKTYPE,
        "fifo": tarfile.FIFOTYPE,
    }  # fmt: skip
    found = members_of(tar_of([(info_of(name, kind, "/etc/passwd"), b"") for name, kind in kinds.items()]))
    assert [(member.name, member.kind, member.size) for member in found] == [(name, "other", 0) for name in kinds]


GOOD = tar_of([(info_of("n" * 150 + f"/{n}.jpg"), os.urandom(300)) for n in range(3)], tarfile.GNU_FORMAT) + tar_of(
    [(info_of("ü" * 80 + f"/{n}.jpg"), os.urandom(300)) for n in range(3)]
)


@settings(max_examples=400, deadline=2000)
@given(
    place=st.integers(0, len(GOOD) - 1), new=st.binary(min_size=1, max_size=24), end=st.integers(0, len(GOOD)),
    mends=st.booleans(),
)  # fmt: skip
def test_any_damage_ends_in_words_or_members_inside_the_file(place: int, new: bytes, end: int, mends: bool):
    content = bytearray(GOOD)
    content[place : place + len(new)] = new
    if mends:  # so that what lies behind the checksum is reached too
        block = place - place % 512
        content[block + 148 : block + 156] = b" " * 8
        content[block + 148 : block + 155] = b"%06o\0" % sum(content[block : block + 512])
    content, found = content[: max(end, place)], list[TarMember]()
    with contextlib.suppress(ValueError):
        found += members_of(bytes(content))
    for member in found:
        assert 0 <= member.start <= member.start + member.size <= len(content)
