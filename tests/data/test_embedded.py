from __future__ import annotations

import zipfile
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

from coatnet.data import embedded, fashion_mnist
from coatnet.data.embedded.__main__ import main
from coatnet.data.sources import measure, open_data
from coatnet.errors import DataError

PACKAGE = Path(str(resources.files(embedded)))


def test_the_small_data_set_is_balanced_and_opens(tmp_path, capsys):
    assert main([str(tmp_path / "new/small")]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/new/small: 5000 pictures of Fashion-MNIST in train/ and test/\n"
    data = open_data(tmp_path / "new/small", holdout_percent=None)
    assert np.bincount(data.train.targets).tolist() == [400] * 10
    assert np.bincount(data.test.targets).tolist() == [100] * 10
    assert measure(data.train) == (28, 28)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["small"], "something was left beside the folder"
    licence = (tmp_path / "new/small/LICENSE.txt").read_text()
    assert licence == (PACKAGE / "LICENSE-fashion-mnist.txt").read_text()
    assert "Copyright (c) 2017 Zalando SE" in licence
    _same_pixels(data)


def _same_pixels(data) -> None:
    """Compare a few with the whole data set, where that is installed."""
    if not fashion_mnist.SYSTEM_FOLDER.is_dir():
        return
    pixels, labels = fashion_mnist.load(fashion_mnist.SYSTEM_FOLDER, "test")
    for index in range(0, 1000, 90):
        _, folder, file = data.test.name(index).split("/")
        row = int(file.removesuffix(".png"))
        assert (data.test.read(index)[:, :, 0] == pixels[row]).all(), f"{data.test.name(index)} has other pixels"
        assert fashion_mnist.CLASS_NAMES[labels[row]].replace("/", "_").replace(" ", "_") == folder


def test_the_archive_is_small():
    num_bytes = (PACKAGE / embedded.ARCHIVE).stat().st_size
    assert num_bytes < 4 * 2**20, f"the archive has {num_bytes} bytes"


def test_what_is_there_is_left_alone(tmp_path, capsys):
    with pytest.raises(DataError, match="already there"):
        embedded.unpack(tmp_path)
    assert (main([str(tmp_path)]), main([]), main(["--help"])) == (1, 2, 2)
    assert "already there. Name a new folder." in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../evil.png", "/evil.png", "train/../../evil.png"])
def test_an_archive_that_leaves_its_folder_is_refused(tmp_path, monkeypatch, name):
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr(name, b"x")
    monkeypatch.setattr(embedded.resources, "files", lambda _: tmp_path)
    monkeypatch.setattr(embedded, "ARCHIVE", "bad.zip")
    with pytest.raises(DataError, match="outside its folder"):
        embedded.unpack(tmp_path / "small")
    assert [file.name for file in tmp_path.iterdir()] == ["bad.zip"]


def test_a_failure_halfway_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "extractall", fail)
    with pytest.raises(OSError, match="No space"):
        embedded.unpack(tmp_path / "small")
    assert not list(tmp_path.iterdir()), "a part was left behind"
