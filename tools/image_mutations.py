"""Small pictures of every kind, and what damage or malice may do to them; each follows from a seed and an index.

`fuzz_images.py` hands them to the decoder. A mutated file keeps enough of its structure to reach deep into a decoder:
sizes, lengths and whole chunks are changed as such, and a PNG's checksums are mostly put right afterwards.
"""

from __future__ import annotations

import io
import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image

KINDS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
MAX_MUTATIONS = 3  # of one file
PNG_REPAIR_RATE = 0.8
# Where decoders change their mind: signs, powers of two, limits of formats.
EXTREMES = (0, 1, 2, 3, 7, 8, 9, 63, 64, 65, 127, 128, 255, 256, 257, 1000, 4096, 16383, 16384, 32767, 32768, 65535)
WIDE_EXTREMES = (*EXTREMES, 65536, 2**24 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 64, 2**32 - 1)


class Field(NamedTuple):
    """A whole number in a file."""

    start: int
    num_bytes: int
    order: str  # "big" or "little"


@dataclass
class Seed:
    """A good file, and where its parts and numbers lie."""

    kind: str
    content: bytes
    parts: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])  # chunks, segments or blocks
    sizes: list[Field] = field(default_factory=list[Field])  # widths and heights
    lengths: list[Field] = field(default_factory=list[Field])  # of parts, and where to find others


def make(seed: int, index: int) -> tuple[str, bytes]:
    """Return the kind and the bytes of one mutated file."""
    rng = random.Random(f"{seed} {index}")
    kind = KINDS[index % len(KINDS)]
    pool = seeds()[kind]
    chosen = rng.choice(pool)
    content = bytearray(chosen.content)
    for _ in range(rng.randint(1, MAX_MUTATIONS)):
        rng.choice(MUTATIONS)(content, chosen, rng.choice(pool), rng)
    if kind == "PNG" and rng.random() < PNG_REPAIR_RATE:
        _repair_png(content)
    return kind, bytes(content)


# ------------------------------------------------------------------------------------------------------ good files


@cache
def seeds() -> dict[str, list[Seed]]:
    """Return good files of each kind, in the modes and flavours that programs write."""
    files = {"JPEG": _jpegs(), "PNG": _pngs(), "WEBP": _webps(), "BMP": _bmps(), "GIF": _gifs()}
    return {kind: [READERS[kind](content) for content in contents] for kind, contents in files.items()}


def _photo(height: int, width: int) -> Image.Image:
    """Draw smooth colours with some noise: (height, width) RGB."""
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(height * width).integers(0, 40, (height, width))
    planes = (x * 255 // width, y * 255 // height, (x + y + noise) % 256)
    return Image.fromarray(np.stack(planes, axis=-1).astype(np.uint8))


def _alpha(height: int, width: int) -> Image.Image:
    image = _photo(height, width)
    image.putalpha(image.getchannel("R"))
    return image


def _deep(height: int, width: int) -> Image.Image:
    return Image.fromarray(
        (np.arange(height * width, dtype=np.uint32) * 37 % 65536).astype(np.uint16).reshape(height, width)
    )


def _exif(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010E] = "a picture"
    return exif.tobytes()


def _encode(image: Image.Image, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def _jpegs() -> list[bytes]:
    photo = _photo(24, 32)
    return [
        _encode(photo, "JPEG", quality=90),
        _encode(_photo(17, 9), "JPEG", quality=60, subsampling=0, comment=b"a comment", exif=_exif(6)),
        _encode(photo, "JPEG", quality=75, subsampling=1, restart_marker_blocks=2, exif=_exif(3)),
        _encode(photo.convert("L"), "JPEG", quality=80, exif=_exif(8)),
        _encode(photo, "JPEG", quality=80, progressive=True),
        _encode(photo.convert("L"), "JPEG", quality=50, progressive=True, optimize=True, xmp=_XMP),
        _encode(photo.convert("CMYK"), "JPEG", quality=80),
        _encode(_photo(16, 16).convert("CMYK"), "JPEG", progressive=True),
        _encode(_photo(64, 64), "JPEG", quality=20, icc_profile=bytes(range(200)), dpi=(72, 72)),
        _encode(_photo(8, 8), "MPO", save_all=True, append_images=[_photo(8, 8)]),  # a JPEG of two pictures
    ]


_XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><tiff:Orientation>5</tiff:Orientation></x:xmpmeta>'


def _pngs() -> list[bytes]:
    photo, alpha = _photo(16, 24), _alpha(12, 12)
    palette = photo.quantize(16)
    pixels = np.asarray(photo)
    return [
        _encode(photo, "PNG"),
        _encode(photo, "PNG", compress_level=0, exif=_exif(7)),  # stored: changed bytes are changed pixels and filters
        _encode(photo.convert("L"), "PNG", transparency=7),
        _encode(alpha, "PNG", compress_level=1),
        _encode(alpha.convert("LA"), "PNG"),
        _encode(palette, "PNG", transparency=bytes(range(0, 256, 16)), bits=4),
        _encode(photo.convert("P"), "PNG", transparency=3, optimize=True),
        _encode(photo.convert("1"), "PNG"),
        _encode(_deep(10, 14), "PNG"),
        _png(np.repeat(pixels, 2, axis=2).reshape(16, 24, 6), depth=16, colour=2),
        _png(pixels, depth=8, colour=2, interlaced=True),
        _png(pixels[:9, :5, :1], depth=8, colour=0, interlaced=True),
        _encode(photo, "PNG", save_all=True, append_images=[_photo(16, 24).rotate(90)], duration=100),
        _encode(photo, "PNG", icc_profile=bytes(300), dpi=(72, 72), pnginfo=_text()),
    ]


def _text() -> object:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("Title", "plain")
    info.add_text("Comment", "packed " * 40, zip=True)
    info.add_itxt("XML:com.adobe.xmp", _XMP.decode())
    return info


def _png(pixels: np.ndarray, *, depth: int, colour: int, interlaced: bool = False) -> bytes:
    """Write what Pillow cannot: 16 bits of colour, or Adam7; pixels (H, W, bytes a pixel)."""
    height, width = pixels.shape[:2]
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    rows = b""
    for top, left, down, right in passes if interlaced else [(0, 0, 1, 1)]:
        part = pixels[top::down, left::right]
        rows += b"".join(b"\0" + row.tobytes() for row in part) if part.size else b""
    head = b"".join(side.to_bytes(4, "big") for side in (width, height)) + bytes([depth, colour, 0, 0, interlaced])
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        _png_chunk(name, data) for name, data in ((b"IHDR", head), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    )


def _png_chunk(name: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")


def _webps() -> list[bytes]:
    photo, alpha = _photo(24, 32), _alpha(16, 16)
    return [
        _encode(photo, "WEBP", quality=70),
        _encode(_photo(9, 17), "WEBP", quality=10, exif=_exif(5), xmp=_XMP),
        _encode(photo, "WEBP", lossless=True),
        _encode(photo.quantize(8).convert("RGB"), "WEBP", lossless=True, icc_profile=bytes(100)),
        _encode(alpha, "WEBP", quality=60),
        _encode(alpha, "WEBP", lossless=True, exact=True),
        _encode(photo, "WEBP", save_all=True, append_images=[photo.rotate(90)], duration=50),
        _encode(alpha, "WEBP", save_all=True, append_images=[alpha.rotate(90)], lossless=True),
    ]


def _bmps() -> list[bytes]:
    photo = _photo(12, 18)
    rgb = _encode(photo, "BMP")
    upside_down = bytearray(rgb)
    upside_down[22:26] = (-12).to_bytes(4, "little", signed=True)
    return [
        rgb,
        bytes(upside_down),
        _encode(photo.convert("L"), "BMP"),
        _encode(photo.quantize(40), "BMP"),
        _encode(photo.convert("1"), "BMP"),
        _encode(_alpha(9, 7), "BMP"),
        _bmp(b"\x06\x01\x00\x05\x01\x02\x03\x04\x05\x00\x00\x00" * 8 + b"\x00\x01", bits=8, compression=1),
        _bmp(b"\x06\x12\x00\x05\x12\x34\x50\x00\x00\x00\x00\x02\x01\x01" * 6 + b"\x00\x01", bits=4, compression=2),
        _bmp(bytes(range(256))[: 12 * 8 * 2], bits=16, compression=3, masks=(0xF800, 0x7E0, 0x1F)),
        _bmp(bytes(range(256)) * 2, bits=32, compression=3, masks=(0xFF0000, 0xFF00, 0xFF)),
    ]


def _bmp(data: bytes, *, bits: int, compression: int, masks: tuple[int, ...] = ()) -> bytes:
    """Write what Pillow cannot, run lengths or bit fields: a picture of 12 x 8 px."""
    palette = b"" if masks else bytes(value for entry in range(2**bits) for value in (entry, 255 - entry, 7, 0))
    table = b"".join(mask.to_bytes(4, "little") for mask in masks) + palette
    numbers = ((40, 4), (12, 4), (8, 4), (1, 2), (bits, 2), (compression, 4), (len(data), 4), *[(0, 4)] * 4)
    head = b"".join(value.to_bytes(num_bytes, "little") for value, num_bytes in numbers)
    start = 14 + len(head) + len(table)
    return (
        b"BM" + (start + len(data)).to_bytes(4, "little") + bytes(4) + start.to_bytes(4, "little") + head + table + data
    )


def _gifs() -> list[bytes]:
    photo = _photo(20, 24)
    frames = [photo.rotate(angle).quantize(32) for angle in (0, 90, 180)]
    return [
        _encode(photo.quantize(64), "GIF"),
        _encode(photo.quantize(16), "GIF", interlace=0, transparency=2, comment=b"a comment"),
        _encode(photo.convert("L"), "GIF"),
        _encode(photo.convert("1"), "GIF"),
        _encode(_alpha(10, 10), "GIF"),
        _encode(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=40, loop=0, disposal=2),
    ]


# ------------------------------------------------------------------------------------------- where their parts lie


def _read_jpeg(content: bytes) -> Seed:
    found = Seed("JPEG", content)
    place = 2
    while place < len(content) - 1:
        marker = content[place + 1]
        if marker == 0xD9:
            found.parts.append((place, len(content)))
            break
        length = int.from_bytes(content[place + 2 : place + 4], "big")
        end = place + 2 + length
        found.lengths.append(Field(place + 2, 2, "big"))
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            found.sizes += [Field(place + 5, 2, "big"), Field(place + 7, 2, "big")]
        if marker == 0xDA:  # the scan lasts until a marker that is no restart
            while content[end] != 0xFF or content[end + 1] == 0 or 0xD0 <= content[end + 1] <= 0xD7:
                end += 1
        found.parts.append((place, end))
        place = end
    return found


def _read_png(content: bytes) -> Seed:
    found = Seed("PNG", content, sizes=[Field(16, 4, "big"), Field(20, 4, "big")])
    place = 8
    while place < len(content):
        end = place + 12 + int.from_bytes(content[place : place + 4], "big")
        found.lengths.append(Field(place, 4, "big"))
        found.parts.append((place, end))
        if content[place + 4 : place + 8] == b"fcTL":
            found.sizes += [Field(place + 8 + start, 4, "big") for start in (4, 8, 12, 16)]
        place = end
    return found


def _read_webp(content: bytes) -> Seed:
    found = Seed("WEBP", content, lengths=[Field(4, 4, "little")])
    place = 12
    while place < len(content):
        length = int.from_bytes(content[place + 4 : place + 8], "little")
        end = place + 8 + length + length % 2
        starts = {b"VP8X": ((12, 3), (15, 3)), b"VP8 ": ((14, 2), (16, 2)), b"VP8L": ((9, 2), (11, 2))}
        frame = {b"ANMF": ((8, 3), (11, 3), (14, 3), (17, 3))}
        name = content[place : place + 4]
        found.sizes += [Field(place + start, size, "little") for start, size in (starts | frame).get(name, ())]
        found.lengths.append(Field(place + 4, 4, "little"))
        found.parts.append((place, end))
        place = end
    return found


def _read_bmp(content: bytes) -> Seed:
    start = int.from_bytes(content[10:14], "little")
    numbers = ((2, 4), (10, 4), (14, 4), (26, 2), (28, 2), (30, 4), (34, 4), (46, 4))
    return Seed(
        "BMP",
        content,
        parts=[(14, 54), (54, start), (start, len(content)), (start, start + 4), (start, start + 12)],
        sizes=[Field(18, 4, "little"), Field(22, 4, "little")],
        lengths=[Field(place, num_bytes, "little") for place, num_bytes in numbers],
    )


def _read_gif(content: bytes) -> Seed:
    found = Seed("GIF", content, sizes=[Field(6, 2, "little"), Field(8, 2, "little")])
    place = 13 + _num_palette_bytes(content[10])
    while content[place] != 0x3B:
        begin = place
        if content[place] == 0x2C:
            found.sizes += [Field(place + start, 2, "little") for start in (1, 3, 5, 7)]
            place += 10 + _num_palette_bytes(content[place + 9]) + 1
        else:
            place += 2
        while content[place]:  # sub-blocks, each with its length before it
            found.lengths.append(Field(place, 1, "little"))
            place += 1 + content[place]
        place += 1
        found.parts.append((begin, place))
    return found


def _num_palette_bytes(flags: int) -> int:
    return 3 * 2 ** (flags % 8 + 1) if flags & 0x80 else 0


READERS: dict[str, Callable[[bytes], Seed]] = {
    "JPEG": _read_jpeg,
    "PNG": _read_png,
    "WEBP": _read_webp,
    "BMP": _read_bmp,
    "GIF": _read_gif,
}

# ---------------------------------------------------------------------------------------------------------- damage
# Each changes `content` in place. `seed` tells where the parts of the untouched file lay, `other` is a file to take
# parts from. After an earlier mutation the places may be off: that is damage too.


def _place(content: bytearray, rng: random.Random) -> int:
    return rng.randrange(len(content)) if content else 0


def _span(content: bytearray, rng: random.Random) -> slice:
    start = _place(content, rng)
    return slice(start, start + 2 ** rng.randint(0, 8))


def _flip_bits(content: bytearray, _seed: Seed, _other: Seed, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 8) if content else 0):
        content[_place(content, rng)] ^= 1 << rng.randrange(8)


def _change_bytes(content: bytearray, _seed: Seed, _other: Seed, rng: random.Random) -> None:
    for _ in range(rng.randint(1, 4) if content else 0):
        content[_place(content, rng)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def _cut_short(content: bytearray, _seed: Seed, _other: Seed, rng: random.Random) -> None:
    del content[_place(content, rng) :]


def _cut_out(content: bytearray, _seed: Seed, _other: Seed, rng: random.Random) -> None:
    del content[_span(content, rng)]


def _insert_noise(content: bytearray, _seed: Seed, _other: Seed, rng: random.Random) -> None:
    place = _place(content, rng)
    content[place:place] = rng.randbytes(2 ** rng.randint(0, 6))


def _repeat_span(content: bytearray, _seed: Seed, _other: Seed, rng: random.Random) -> None:
    place = _place(content, rng)
    content[place:place] = content[_span(content, rng)] * rng.choice((1, 1, 2, 30))


def _splice(content: bytearray, _seed: Seed, other: Seed, rng: random.Random) -> None:
    """Go on as another file of the kind, from the same place or any other."""
    place = _place(content, rng)
    content[place:] = other.content[place if rng.random() < 0.5 else rng.randrange(len(other.content)) :]


def _repeat_part(content: bytearray, seed: Seed, _other: Seed, rng: random.Random) -> None:
    start, end = rng.choice(seed.parts)
    content[end:end] = content[start:end] * rng.choice((1, 1, 1, 50))


def _drop_part(content: bytearray, seed: Seed, _other: Seed, rng: random.Random) -> None:
    del content[slice(*rng.choice(seed.parts))]


def _swap_parts(content: bytearray, seed: Seed, _other: Seed, rng: random.Random) -> None:
    one, two = sorted(rng.choices(seed.parts, k=2))
    if one[1] <= two[0]:
        first, last = content[slice(*one)], content[slice(*two)]
        content[slice(*two)] = first
        content[slice(*one)] = last


def _borrow_part(content: bytearray, seed: Seed, other: Seed, rng: random.Random) -> None:
    """Put a part of another file before one of this, or in its place."""
    start, end = rng.choice(seed.parts)
    content[start : rng.choice((start, end))] = other.content[slice(*rng.choice(other.parts))]


def _edit_size(content: bytearray, seed: Seed, _other: Seed, rng: random.Random) -> None:
    _set_number(content, rng.choice(seed.sizes), rng)


def _edit_length(content: bytearray, seed: Seed, _other: Seed, rng: random.Random) -> None:
    _set_number(content, rng.choice(seed.lengths), rng)


def _set_number(content: bytearray, place: Field, rng: random.Random) -> None:
    where = slice(place.start, place.start + place.num_bytes)
    now, limit = int.from_bytes(content[where], place.order), 256**place.num_bytes  # pyright: ignore[reportArgumentType]
    extreme = rng.choice(WIDE_EXTREMES if place.num_bytes > 2 else EXTREMES)
    value = rng.choice((extreme, now + 1, now - 1, 2 * now, now // 2, -now)) % limit
    content[where] = value.to_bytes(place.num_bytes, place.order)  # pyright: ignore[reportArgumentType]


def _swap_lengths(content: bytearray, seed: Seed, _other: Seed, rng: random.Random) -> None:
    """Exchange two lengths, or reverse the bytes of one."""
    one, two = rng.choices(seed.lengths, k=2)
    here = slice(one.start, one.start + one.num_bytes)
    if one == two:
        content[here] = content[here][::-1]
    elif one.num_bytes == two.num_bytes:
        there = slice(two.start, two.start + two.num_bytes)
        content[here], content[there] = content[there], content[here]


MUTATIONS = (
    _flip_bits,
    _flip_bits,
    _change_bytes,
    _change_bytes,
    _cut_short,
    _cut_out,
    _insert_noise,
    _repeat_span,
    _splice,
    _repeat_part,
    _drop_part,
    _swap_parts,
    _borrow_part,
    _edit_size,
    _edit_length,
    _swap_lengths,
)


def _repair_png(content: bytearray) -> None:
    """Put the checksums right, as far as the chunks can be followed."""
    place = 8
    while place + 12 <= len(content):
        end = place + 8 + int.from_bytes(content[place : place + 4], "big")
        if end + 4 > len(content):
            return
        content[end : end + 4] = zlib.crc32(content[place + 4 : end]).to_bytes(4, "big")
        place = end + 4
