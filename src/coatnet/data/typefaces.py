"""Typefaces that have the wanted characters, by family, and which of the families are kept for val and test."""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

FONT_FOLDER = Path("/usr/share/fonts")  # where Debian's fonts-* packages put theirs
NO_LETTERS = ("symbol", "dingbat", "emoji", "math", "icon", "music", "braille", "d050000l", "standardsymbols")


def font_files(folder: Path) -> list[Path]:
    """Return the TrueType and OpenType files below a folder, in one order everywhere."""
    return sorted((*folder.rglob("*.ttf"), *folder.rglob("*.otf")))


def find_families(folder: Path, characters: Iterable[str]) -> dict[str, list[Path]]:
    """Return the font files below a folder that have all these characters, by family, sorted."""
    from fontTools.ttLib import TTFont, TTLibError

    logging.getLogger("fontTools").setLevel(logging.ERROR)  # its remarks on tables that are not used here
    families: dict[str, list[Path]] = defaultdict(list)
    wanted = {ord(character) for character in characters}
    for path in font_files(folder):
        try:
            with TTFont(path, lazy=True) as font:
                family = (font["name"].getBestFamilyName() or path.stem).replace(" ", "").replace("/", "")
                has_all = wanted <= set(font.getBestCmap() or {})
        except (TTLibError, KeyError, OSError, AssertionError):
            continue
        if has_all and not any(word in family.lower() for word in NO_LETTERS):
            families[family].append(path)
    return dict(sorted(families.items()))


def part_of(family: str) -> Literal["train", "val", "test"]:
    """Return where a family belongs: of ten, eight in train, one in val, one in test."""
    digit = seed_of(family) % 10
    return "val" if digit == 0 else "test" if digit == 1 else "train"


def seed_of(text: str) -> int:
    """Return a number that follows from a text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
