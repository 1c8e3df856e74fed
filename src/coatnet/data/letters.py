"""Letters and digits drawn in this machine's typefaces: a task of any size, for studies of how much data is needed.

Grey pictures of 28 x 28 px in the 47 classes of EMNIST Balanced (Cohen et al., arXiv 1702.05373), as many of each. A
family of typefaces goes whole into train or test, so no letter of a test family was ever seen; families that look alike
under other names are not told apart. A picture follows from (part, number) and the fonts below the folder alone, so
that the first N pictures of a larger set are those of a smaller one. Drawn once, in blocks, and kept in the cache.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from coatnet.data import draws
from coatnet.data.decode import Pixels
from coatnet.data.draws import IntArray
from coatnet.data.image_sets import ArrayImages
from coatnet.data.typefaces import FONT_FOLDER, find_families, font_files, part_of
from coatnet.errors import DataError
from coatnet.files import private_cache, write_atomic

CLASS_NAMES = tuple("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghnqrt")
NUM_TRAIN, NUM_TEST = 100_000, 10_000  # train unless the name says how many: letters:N
MAX_TRAIN = 10_000_000
BLOCK = 10_000  # pictures a file
MIN_FAMILIES = 20
SIDE = 28  # px
_VERSION = 1  # of the drawing; another one draws anew
_GLYPH_PX = 64  # a glyph's em before it is turned and shrunk
_FINER = 2  # drawn at so many times the side

# What makes the task hard: each is drawn evenly from its range.
_SIZE_PX = (11, 22)  # of the longer side
_STRETCH, _SLANT, _ANGLE_DEGREES, _SHIFT_PX = 0.2, 0.25, 20, 4  # to either side
_CONTRAST = (25, 130)  # grey levels between ink and ground
_BLUR_PX = (0, 1.2)
_NOISE = (0.04, 0.3)  # its deviation, in contrasts


@dataclass(frozen=True)
class LetterImages(ArrayImages):
    """Pictures that a worker reads from the cache again: 78 MB need not go through a pipe."""

    folder: Path  # of the fonts
    key: str  # of the drawing and the fonts: with the names, what the pictures follow from

    def __reduce__(self) -> tuple[Callable[..., LetterImages], tuple[Path, str, int, IntArray]]:
        return images, (self.folder, self.part, len(self.labels), self.rows)


def open_letters(num_train: int = NUM_TRAIN, folder: Path = FONT_FOLDER) -> dict[str, LetterImages]:
    """Return train and test, drawing what is not kept yet. Raises: DataError."""
    if not len(CLASS_NAMES) <= num_train <= MAX_TRAIN:
        raise DataError(f"letters:{num_train} cannot be drawn. Give {len(CLASS_NAMES)} to {MAX_TRAIN} pictures.")
    return {"train": images(folder, "train", num_train), "test": images(folder, "test", NUM_TEST)}


def images(folder: Path, part: str, num_images: int, rows: IntArray | None = None) -> LetterImages:
    """Return the first pictures of "train" or "test", or these rows of them. Raises: DataError."""
    labels = np.arange(num_images) % len(CLASS_NAMES)
    shown = np.arange(num_images) if rows is None else rows
    key = _key_of(folder)
    return LetterImages(_load(folder, key, part, num_images), labels, CLASS_NAMES, part, shown, folder, key)


@lru_cache(maxsize=2)
def _load(folder: Path, key: str, part: str, num_images: int) -> Pixels:
    """Return the first pictures of a part (N, 28, 28) uint8, from the cache where they lie there. Raises: DataError."""
    try:
        kept = private_cache("letters") / key
    except OSError as error:
        raise DataError(f"letters cannot be kept: {error}") from None
    files = [kept / f"{part}-{number:04d}.npz" for number in range(-(-num_images // BLOCK))]
    blocks = {number: block for number, file in enumerate(files) if (block := _read(file)) is not None}
    if missing := [number for number in range(len(files)) if number not in blocks]:
        typefaces = _find_typefaces(folder, key)[part]
        from rich.console import Console
        from rich.progress import Progress

        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            for number in bar.track(missing, description=f"drawing letters ({part})"):
                blocks[number] = _draw_block(typefaces, part, number)
                _write(files[number], blocks[number])
    return np.concatenate([blocks[number] for number in range(len(files))])[:num_images]


def _key_of(folder: Path) -> str:
    """Return what stands for the drawing and the fonts: other fonts give other pictures."""
    fonts = [(path.relative_to(folder).as_posix(), path.stat().st_size) for path in font_files(folder)]
    return hashlib.sha256(json.dumps([_VERSION, BLOCK, MIN_FAMILIES, CLASS_NAMES, fonts]).encode()).hexdigest()[:24]


def _read(file: Path) -> Pixels | None:
    """Return a kept block (BLOCK, 28, 28); None where it is not there or damaged (a zip has a checksum)."""
    try:
        with np.load(io.BytesIO(file.read_bytes())) as content:
            block = content["pixels"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return block if block.shape == (BLOCK, SIDE, SIDE) and block.dtype == np.uint8 else None


def _write(file: Path, block: Pixels) -> None:
    content = io.BytesIO()
    np.savez(content, pixels=block)
    try:
        write_atomic(file, content.getvalue())
    except OSError as error:
        raise DataError(
            f"{file} cannot be written ({error.strerror}). Set XDG_CACHE_HOME to a disk with room."
        ) from None


@lru_cache(maxsize=1)
def _find_typefaces(folder: Path, _key: str) -> dict[str, list[list[Path]]]:
    """Return the fonts of each family, for train eight families of ten, for test the others. Raises: DataError."""
    families = find_families(folder, CLASS_NAMES)
    drawing = [(name, [path for path in paths if _draws(path)]) for name, paths in families.items()]
    parts: dict[str, list[list[Path]]] = {"train": [], "test": []}
    for name, paths in drawing:
        if paths:
            parts["train" if part_of(name) == "train" else "test"].append(paths)
    num_families = sum(map(len, parts.values()))
    if num_families < MIN_FAMILIES or not all(parts.values()):
        raise DataError(
            f"letters takes {MIN_FAMILIES} families of typefaces or more; below {folder} are {num_families} "
            f"({len(parts['test'])} of them for the test). Install some; of Debian's packages, "
            "fonts-dejavu, fonts-liberation, fonts-freefont-ttf, fonts-lato, fonts-roboto, fonts-noto-core, fonts-cmu."
        )
    return parts


def _draws(path: Path) -> bool:
    """Return whether a font has a shape for every class, and not one shape for all."""
    try:
        font = _open_font(path)
        masks: dict[str, Any] = {character: font.getmask(character) for character in CLASS_NAMES}  # PIL's own, untyped
    except (OSError, ValueError):
        return False
    return all(mask.getbbox() for mask in masks.values()) and len({bytes(masks[letter]) for letter in "A8g"}) == 3


def _draw_block(families: Sequence[Sequence[Path]], part: str, number: int) -> Pixels:
    return np.stack([draw(families, part, place) for place in range(number * BLOCK, (number + 1) * BLOCK)])


def draw(families: Sequence[Sequence[Path]], part: str, number: int) -> Pixels:
    """Draw one picture (28, 28) uint8."""
    rng = draws.generator(0, f"letters/{part}", _VERSION, number)
    fonts = families[int(rng.integers(len(families)))]
    glyph = _glyph(fonts[int(rng.integers(len(fonts)))], CLASS_NAMES[number % len(CLASS_NAMES)])
    shape = np.asarray(_place(glyph, rng), dtype=np.float64) / 255
    contrast = rng.uniform(*_CONTRAST) * rng.choice((-1, 1))  # dark on light, light on dark
    ground = rng.uniform(max(0, -contrast), 255 - max(0, contrast))
    noise = rng.normal(0, rng.uniform(*_NOISE), (SIDE, SIDE))
    return (ground + contrast * (shape + noise)).clip(0, 255).astype(np.uint8)


def _glyph(path: Path, character: str) -> Image.Image:
    """Return a character's shape, cut out."""
    font = _open_font(path)
    canvas = Image.new("L", (3 * _GLYPH_PX, 3 * _GLYPH_PX))
    ImageDraw.Draw(canvas).text((1.5 * _GLYPH_PX, 1.5 * _GLYPH_PX), character, fill=255, font=font, anchor="mm")
    return canvas.crop(canvas.getbbox())


def _open_font(path: Path) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(path), _GLYPH_PX, layout_engine=ImageFont.Layout.BASIC)


def _place(glyph: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Scale, slant, turn, move and blur a shape into (28, 28)."""
    size = rng.uniform(*_SIZE_PX) * _FINER / max(glyph.size)
    stretch, slant = np.exp(rng.uniform(-_STRETCH, _STRETCH)), rng.uniform(-_SLANT, _SLANT)
    angle = np.radians(rng.uniform(-_ANGLE_DEGREES, _ANGLE_DEGREES))
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    back = np.linalg.inv(turn @ [[1, slant], [0, 1]] @ np.diag([size * stretch, size / stretch]))
    centre = (SIDE / 2 + rng.uniform(-_SHIFT_PX, _SHIFT_PX, 2)) * _FINER
    start = np.array(glyph.size) / 2 - back @ centre
    affine = (back[0, 0], back[0, 1], start[0], back[1, 0], back[1, 1], start[1])
    fine = glyph.transform((SIDE * _FINER, SIDE * _FINER), Image.Transform.AFFINE, affine, Image.Resampling.BILINEAR)
    return fine.reduce(_FINER).filter(ImageFilter.GaussianBlur(rng.uniform(*_BLUR_PX)))
