"""Draw the 26 capitals in the system's typefaces: a real task of any size, for the figures of int8 among others.

    python tools/draw_letters.py LETTERS --train 60 --test 30 --side 112

A typeface family goes whole into train, val or test, so that no letter of a test family was ever seen. Letters are
turned, moved, scaled, coloured and blurred a little, with noise; everything follows from the names of the fonts.
Fonts: Debian's fonts-* packages, or any folder of fonts.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from coatnet.data.typefaces import FONT_FOLDER, find_families, part_of, seed_of

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def main() -> None:
    """Draw every family's letters into OUT/part/letter/."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--fonts", type=Path, default=FONT_FOLDER)
    parser.add_argument("--train", type=int, default=60, help="pictures of each letter and train family")
    parser.add_argument("--test", type=int, default=30, help="of each letter and val or test family")
    parser.add_argument("--side", type=int, default=112, help="px")
    wanted = parser.parse_args()
    families = find_families(wanted.fonts, LETTERS)
    for family, paths in families.items():
        part = part_of(family)
        for number in range(wanted.train if part == "train" else wanted.test):
            for letter in LETTERS:
                rng = np.random.default_rng(seed_of(f"{family} {letter} {number}"))
                picture = draw(letter, paths[rng.integers(len(paths))], wanted.side, rng)
                folder = wanted.out / part / letter
                folder.mkdir(parents=True, exist_ok=True)
                picture.save(folder / f"{family}_{number:03d}.jpg", quality=90)
    counts = {part: sum(part_of(family) == part for family in families) for part in ("train", "val", "test")}
    print(f"{len(families)} families: {counts}")


def draw(letter: str, path: Path, side: int, rng: np.random.Generator) -> Image.Image:
    """Draw one letter: (side, side) RGB."""
    ground, ink = rng.integers(0, 256, 3), rng.integers(0, 256, 3)
    while abs(int(ground.sum()) - int(ink.sum())) < 200:
        ink = rng.integers(0, 256, 3)
    canvas = Image.new("RGB", (2 * side, 2 * side), tuple(ground.tolist()))
    font = ImageFont.truetype(str(path), int(side * rng.uniform(0.9, 1.5)))
    place = (side + rng.uniform(-0.1, 0.1) * side, side + rng.uniform(-0.1, 0.1) * side)
    ImageDraw.Draw(canvas).text(place, letter, fill=tuple(ink.tolist()), font=font, anchor="mm")
    turned = canvas.rotate(rng.uniform(-20, 20), Image.Resampling.BICUBIC, fillcolor=tuple(ground.tolist()))
    small = turned.resize((side, side), Image.Resampling.LANCZOS).filter(ImageFilter.GaussianBlur(rng.uniform(0, 1)))
    noisy = np.asarray(small) + rng.normal(0, rng.uniform(2, 25), (side, side, 3))
    return Image.fromarray(np.uint8(noisy.clip(0, 255)))


if __name__ == "__main__":
    main()
