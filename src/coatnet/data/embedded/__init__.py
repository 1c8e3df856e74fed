"""A small real data set that needs no network: 5,000 pictures of Fashion-MNIST as files, for examples and tests.

4,000 for training and 1,000 for the test, the first of each class in file order, as grey PNGs of 28 x 28 px.
Written by tools/embed_fashion_mnist.py. MIT licence, (c) 2017 Zalando SE: LICENSE-fashion-mnist.txt.
"""

from __future__ import annotations

import zipfile
from importlib import resources
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from coatnet.errors import DataError

ARCHIVE = "fashion_mnist_small.zip"


def unpack(folder: Path) -> int:
    """Write the data set into a new folder, whole or not at all, and return its number of pictures.

    Raises: DataError if something is already there, or the archive holds a path that leaves the folder.
    """
    if folder.exists():
        raise DataError(f"{folder} is already there. Name a new folder.")
    with resources.files(__name__).joinpath(ARCHIVE).open("rb") as file, zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        if leaving := [name for name in names if ".." in PurePosixPath(name).parts or name.startswith("/")]:
            raise DataError(f"{ARCHIVE} holds {leaving[0]}, outside its folder. Install coatnet again.")
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as aside:
            archive.extractall(Path(aside, "whole"))
            Path(aside, "whole").rename(folder)
    return sum(name.endswith(".png") for name in names)
