"""One picture from bytes to pixels, within limits, with one kind of error.

JPEG goes through simplejpeg, which gives the same bits as Pillow sooner; all else through Pillow. Pictures come
upright (EXIF orientation applied) and as RGB. What is transparent is laid over white, as a page would show it: under
transparent pixels files keep arbitrary colours that nobody is meant to see.
"""

from __future__ import annotations

import contextlib
import re
import threading
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from stat import S_ISREG

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from coatnet.errors import BadImageError

Pixels = NDArray[np.uint8]
MinSide = Callable[[tuple[int, int]], int]  # of a picture (height, width) upright, the least side in px that will do

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")
MAX_FILE_BYTES = 256 * 2**20
MAX_PIXELS = 100_000_000
# What a small file can make a decoder do for minutes, found by fuzzing: each limit is about a second or two of work.
MAX_RUN_LENGTH_PIXELS = 10_000_000  # of a BMP in run lengths, which Pillow unpacks in Python
MAX_SCANNED_PIXELS = 2_000_000_000  # pixels x scans of a JPEG; a scan may be ten bytes and still visits every pixel
MAX_BLOCKS = 64  # of metadata of one kind, where joining them costs the square of their number, or each unpacks to 1 MB
SMALL_FILE_BYTES = 2**18  # too few to hold blocks that matter

_ORIENTATION = 0x0112  # EXIF tag
_BLOCKS = {b"\xff\xd8": re.compile(b"Exif\0\0"), b"\x89P": re.compile(b"iCCP")}  # by how a file begins
_MANY_SCANS = re.compile(rb"\xff[\xc2\xc3\xc9\xca]")  # JPEG's frame markers but the two of plain Huffman coding
_FRAME, _SCAN = 0xC0, 0xDA  # JPEG's markers: a baseline frame, and where the pixels begin
_PLAIN_PARTS = bytes([_FRAME, 0xC4, 0xDB, 0xDD, 0xE0, 0xFE])  # with both kinds of tables, restarts, JFIF and comments
_MAX_PLAIN_PARTS = 32
# Filters of warnings belong to the whole process: without a lock, two threads could leave each other's behind.
_QUIET = threading.Lock()


def decode(content: bytes | Path, *, name: str = "", min_side: int | MinSide = 0) -> Pixels:
    """Decode a picture's first frame -> (H, W, 3) uint8, RGB, upright.

    With `min_side` (px) a larger JPEG may come at a half, quarter or eighth of its size, each side still at least so
    long: much faster for photographs. It may depend on the size: it is then called once, where it matters.

    Raises: BadImageError, and nothing else, for whatever cannot be decoded whole within the limits.
    """
    name = name or (str(content) if isinstance(content, Path) else "picture")
    try:
        data = _read(content)
        size, orientation, image = _plain_jpeg_size(data), 1, None
        if size is None:
            image, orientation = _open(data)
            if image.format == "JPEG" and image.mode in ("RGB", "L"):  # not CMYK
                size = (image.height, image.width)
        pixels = None if size is None else _decode_jpeg(data, size, orientation, min_side)
        if pixels is None:  # no JPEG, or one that simplejpeg refuses
            pixels = _to_rgb(_open(data)[0] if image is None else image)
        return _upright(pixels, orientation)
    except MemoryError:
        raise
    except Exception as error:
        raise BadImageError(f"{name}: {_reason(error)}") from None


def read_size(content: bytes | Path, *, name: str = "") -> tuple[int, int]:
    """Return (height, width) in px from the header alone, upright. Raises: BadImageError."""
    name = name or (str(content) if isinstance(content, Path) else "picture")
    try:
        data = _read(content)
        if (size := _plain_jpeg_size(data)) is not None:
            return size
        image, orientation = _open(data)
    except MemoryError:
        raise
    except Exception as error:
        raise BadImageError(f"{name}: {_reason(error)}") from None
    return (image.width, image.height) if orientation >= 5 else (image.height, image.width)


class _LimitError(Exception):
    """A limit of ours, in words ready for the user."""


def _reason(error: Exception) -> str:
    if isinstance(error, _LimitError):
        return str(error)
    if isinstance(error, Image.UnidentifiedImageError):
        return "damaged, or not a picture of a known kind (JPEG, PNG, WebP, BMP, GIF)."
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read ({error.strerror})."
    said = " ".join(str(error).split())[:200]
    return f"damaged or cut short ({said or type(error).__name__})."


def _read(content: bytes | Path) -> bytes:
    """Return the bytes, having looked at their number first."""
    if isinstance(content, Path):
        found = content.stat()
        if not S_ISREG(found.st_mode):
            raise _LimitError("not a file.")
        num_bytes = found.st_size
    else:
        num_bytes = len(content)
    if num_bytes == 0:
        raise _LimitError("empty (0 bytes).")
    if num_bytes > MAX_FILE_BYTES:
        raise _LimitError(f"{num_bytes / 2**20:.0f} MiB, at most {MAX_FILE_BYTES // 2**20} MiB are read.")
    return content.read_bytes() if isinstance(content, Path) else content


def _plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Return (height, width) in px of a JPEG of the plainest kind, which needs no look by Pillow; else None.

    That is baseline, colour or grey, within the limits, and without any metadata but JFIF's own and comments.
    """
    at, size = 2, None
    for _ in range(_MAX_PLAIN_PARTS):
        if data[:2] != b"\xff\xd8" or at + 10 > len(data) or data[at] != 0xFF:
            break
        marker, num_bytes = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        if marker == _SCAN:
            return size
        if marker not in _PLAIN_PARTS:
            break
        if marker == _FRAME:
            height, width = int.from_bytes(data[at + 5 : at + 7]), int.from_bytes(data[at + 7 : at + 9])
            if data[at + 9] not in (1, 3) or not 0 < height * width <= MAX_PIXELS:
                break
            size = height, width
        at += 2 + num_bytes
    return None


def _open(data: bytes) -> tuple[Image.Image, int]:
    """Read the header, refuse pictures that are too large, and return the undecoded picture and its orientation."""
    blocks = _BLOCKS.get(data[:2]) if len(data) > SMALL_FILE_BYTES else None
    if blocks and len(blocks.findall(data)) > MAX_BLOCKS:
        raise _LimitError(f"more than {MAX_BLOCKS} blocks of metadata. Save the picture without them.")
    file = BytesIO(data)
    with _QUIET, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(file, formats=FORMATS)
        except Image.DecompressionBombError:
            raise _LimitError(f"far more than {MAX_PIXELS / 1e6:.0f} megapixels. Shrink it.") from None
        if image.width * image.height > MAX_PIXELS:
            megapixels = image.width * image.height / 1e6
            raise _LimitError(f"{megapixels:.0f} megapixels, at most {MAX_PIXELS / 1e6:.0f} are read. Shrink it.")
        _refuse_slow(data, image, file.tell())
        orientation = 1
        with contextlib.suppress(Exception):  # a broken EXIF block says nothing about the pixels
            found = image.getexif().get(_ORIENTATION, 1) if "exif" in image.info or "xmp" in image.info else 1
            orientation = found if found in range(1, 9) else 1
    return image, orientation


def _refuse_slow(data: bytes, image: Image.Image, header_end: int) -> None:
    """Refuse a picture within the other limits that would keep a decoder busy for minutes."""
    num_pixels = image.width * image.height
    if image.format == "BMP" and image.info["compression"] in (1, 2) and num_pixels > MAX_RUN_LENGTH_PIXELS:
        raise _LimitError(
            f"{num_pixels / 1e6:.0f} megapixels in run lengths, at most {MAX_RUN_LENGTH_PIXELS / 1e6:.0f} are read. "
            "Save it as PNG."
        )
    if image.format in ("JPEG", "MPO") and _MANY_SCANS.search(data, 0, header_end):
        num_scans = data.count(b"\xff\xda")  # pixels never hold these bytes, metadata seldom
        if num_scans * num_pixels > MAX_SCANNED_PIXELS:
            raise _LimitError(f"{num_scans} scans of {num_pixels / 1e6:.0f} megapixels. Save it as a plain JPEG.")


def _decode_jpeg(data: bytes, size: tuple[int, int], orientation: int, min_side: int | MinSide) -> Pixels | None:
    """Decode a JPEG of that size, not upright, through simplejpeg, or return None for what it refuses."""
    height, width = size
    if not isinstance(min_side, int):
        min_side = min_side((width, height) if orientation >= 5 else (height, width))
    # Of the sizes that libjpeg can decode to, these three alone are faster than the whole.
    part = next((part for part in (8, 4, 2) if 0 < min_side <= min(size) / part), 1)
    try:
        return simplejpeg.decode_jpeg(
            data,
            "RGB",
            min_height=-(-height // part) if part > 1 else 0,
            min_width=-(-width // part) if part > 1 else 0,
        )
    except ValueError:
        return None


def _to_rgb(image: Image.Image) -> Pixels:
    """Decode through Pillow, whatever the mode -> (H, W, 3) uint8."""
    image.load()
    if image.mode.startswith("I"):  # 16 bits of grey: scaled, where Pillow's own conversion clips
        grey = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return np.repeat(((grey * 255 + 32767) // 65535).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.array(image.convert("RGB"))


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """Apply an EXIF orientation, 1 .. 8: the even half of them mirror, the last four also swap the axes."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
