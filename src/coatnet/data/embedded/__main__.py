"""`python -m coatnet.data.embedded FOLDER` writes the small data set into a new folder."""

from __future__ import annotations

import sys
from pathlib import Path

from coatnet.data.embedded import unpack
from coatnet.errors import CoatnetError


def main(arguments: list[str]) -> int:
    """Unpack and say so in one line; 0 done, 1 could not, 2 called wrongly."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("Usage: python -m coatnet.data.embedded FOLDER", file=sys.stderr)
        return 2
    try:
        num_images = unpack(Path(arguments[0]))
    except (CoatnetError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{arguments[0]}: {num_images} pictures of Fashion-MNIST in train/ and test/")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
