"""Letters drawn in typefaces: the same pictures each time, of balanced classes, kept, and drawn again when damaged."""

from __future__ import annotations

import io
import os
import pickle
import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from fontTools import subset
from fontTools.ttLib import TTFont

from coatnet.data import letters
from coatnet.data.letters import CLASS_NAMES, LetterImages, images, open_letters
from coatnet.data.sources import fingerprint, measure, name_of, open_data
from coatnet.data.typefaces import FONT_FOLDER, part_of
from coatnet.errors import DataError

BUNDLED = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
NUM_FAMILIES = 24


@pytest.fixture(scope="module")
def fonts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 24 families: matplotlib's DejaVu with the letters alone, under other names."""
    folder = tmp_path_factory.mktemp("fonts")
    small = list[bytes]()
    for name in ("DejaVuSans", "DejaVuSerif-Bold", "DejaVuSansMono-Oblique"):
        with TTFont(BUNDLED / f"{name}.ttf") as font:
            cutter = subset.Subsetter(subset.Options(layout_features=[]))
            cutter.populate(text="".join(CLASS_NAMES))
            cutter.subset(font)
            content = io.BytesIO()
            font.save(content)
        small.append(content.getvalue())
    for number in range(NUM_FAMILIES):
        with TTFont(io.BytesIO(small[number % 3])) as font:
            for name_id in (1, 16, 21):  # where programs look for the family
                font["name"].setName(f"Family {number}", name_id, 3, 1, 0x409)
            (folder / f"{number % 2}").mkdir(exist_ok=True)
            font.save(folder / f"{number % 2}" / f"{number:02d}.ttf")
    return folder


@pytest.fixture(autouse=True)
def small_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw few pictures, into a cache of the test's own."""
    monkeypatch.setattr(letters, "BLOCK", 100)
    monkeypatch.setattr(letters, "NUM_TEST", 150)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    letters._load.cache_clear()


def files_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("cache/coatnet/letters/*/*.npz"))


def test_train_and_test_are_balanced_and_of_the_size_asked_for(fonts: Path):
    parts = open_letters(235, fonts)
    assert {part: len(found) for part, found in parts.items()} == {"train": 235, "test": 150}
    assert np.bincount(parts["train"].targets).tolist() == [5] * 47
    assert parts["train"].read(3).shape == (28, 28, 3)
    assert measure(parts["test"]) == (28, 28)
    assert parts["train"].name(7) == "train/7"


def test_every_picture_shows_something_and_no_two_are_equal(fonts: Path):
    parts = open_letters(200, fonts)
    pixels = np.concatenate([found.pixels for found in parts.values()])
    blank = np.flatnonzero(pixels.reshape(len(pixels), -1).std(axis=1) < 1)
    assert not blank.size, f"{blank.tolist()} show nothing"
    assert len({picture.tobytes() for picture in pixels}) == len(pixels)
    brighter = np.mean([np.median(picture) < picture.mean() for picture in pixels])
    assert 0.3 < brighter < 0.7, f"{brighter:.0%} are light on dark"


def test_the_first_of_a_larger_set_are_those_of_a_smaller_one(fonts: Path):
    small, large = images(fonts, "train", 130), images(fonts, "train", 290)
    np.testing.assert_array_equal(large.pixels[:130], small.pixels)
    assert large.targets[:130].tolist() == small.targets.tolist()


def test_drawn_anew_elsewhere_they_are_the_same(fonts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = images(fonts, "train", 60)
    shutil.copytree(fonts, tmp_path / "moved")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache2"))
    again = images(tmp_path / "moved", "train", 60)
    assert again.key == first.key
    np.testing.assert_array_equal(again.pixels, first.pixels)


def test_a_second_call_reads_the_cache_alone(fonts: Path, tmp_path: Path):
    shutil.copytree(fonts, tmp_path / "fonts")
    first = images(tmp_path / "fonts", "train", 150)
    assert [file.name for file in files_of(tmp_path)] == ["train-0000.npz", "train-0001.npz"]
    for file in (tmp_path / "fonts").rglob("*.ttf"):
        file.write_bytes(bytes(file.stat().st_size))  # fonts that nobody could draw with
    letters._load.cache_clear()
    np.testing.assert_array_equal(images(tmp_path / "fonts", "train", 150).pixels, first.pixels)


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "other"])
def test_a_damaged_file_is_drawn_again(damage: str, fonts: Path, tmp_path: Path):
    first = images(fonts, "train", 150)
    kept, file = files_of(tmp_path)
    before, content = kept.stat().st_mtime_ns, bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    changed = {"cut": content[:5000], "flipped": content, "emptied": b"", "other": b"no pictures"}
    file.write_bytes(changed[damage])
    letters._load.cache_clear()
    np.testing.assert_array_equal(images(fonts, "train", 150).pixels, first.pixels)
    assert kept.stat().st_mtime_ns == before, "a whole file was drawn again too"
    with np.load(file) as block:
        np.testing.assert_array_equal(block["pixels"][:50], first.pixels[100:])


def test_other_fonts_are_another_data_set(fonts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shutil.copytree(fonts, tmp_path / "fonts")
    monkeypatch.setattr(open_letters, "__defaults__", (94, tmp_path / "fonts"))
    first = fingerprint(open_data("letters"))
    assert fingerprint(open_data("letters")) == first
    next((tmp_path / "fonts").rglob("*.ttf")).unlink()
    assert fingerprint(open_data("letters")) != first


def test_no_family_of_test_was_trained_on(fonts: Path):
    parts = letters._find_typefaces(fonts, letters._key_of(fonts))
    train, test = ({path for paths in parts[part] for path in paths} for part in ("train", "test"))
    assert train
    assert test
    assert not train & test
    assert len(train | test) == NUM_FAMILIES
    assert part_of("Family0") == part_of("Family0")


def test_a_worker_gets_names_and_not_pixels(fonts: Path):
    found = images(fonts, "train", 190).take(np.array([180, 2, 7]))
    content = pickle.dumps(found)
    assert len(content) < 1000, f"pickled to {len(content)} bytes"
    again = pickle.loads(content)
    assert isinstance(again, LetterImages)
    assert [again.name(index) for index in range(3)] == ["train/180", "train/2", "train/7"]
    np.testing.assert_array_equal(again.read(0), found.read(0))


def message(call) -> str:
    with pytest.raises(DataError) as met:
        call()
    assert "\n" not in str(met.value)
    return str(met.value)


def test_too_few_typefaces_say_what_to_install():
    met = message(lambda: images(BUNDLED, "train", 50))
    for part in ("20 families", str(BUNDLED), "fonts-dejavu"):
        assert part in met, f"{part!r} is not in: {met}"
    assert " are 0 " in message(lambda: images(BUNDLED / "nowhere", "train", 50))


def test_a_font_of_one_shape_for_all_is_passed_over():
    assert letters._draws(BUNDLED / "DejaVuSans.ttf")
    last_resort = BUNDLED / "LastResortHE-Regular.ttf"
    if not last_resort.is_file():
        pytest.skip("this matplotlib has no LastResort")
    assert not letters._draws(last_resort)


def test_a_font_that_draws_nothing_for_a_class_is_passed_over(fonts: Path, tmp_path: Path):
    path = next(fonts.glob("*/*.ttf"))
    assert letters._draws(path)
    with TTFont(path) as font:
        glyph = font["glyf"][font.getBestCmap()[ord("7")]]
        glyph.numberOfContours = 0
        font.save(tmp_path / "no7.ttf")
    assert not letters._draws(tmp_path / "no7.ttf")


@pytest.mark.parametrize("name", ["letters:", "letters:x", "letters:-5", "letters:5", "letters:99999999", "digits:10"])
def test_a_number_that_is_none_is_refused(name: str):
    assert name.split(":")[0] in message(lambda: open_data(name))


def test_a_run_is_called_after_it():
    assert [name_of(name) for name in ("letters", "letters:5000")] == ["letters", "letters-5000"]


def test_a_folder_of_that_name_goes_first(make_folder, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(make_folder({"ant": 2, "bee": 2}, "d/letters").parent)
    assert open_data("letters").class_names == ("ant", "bee")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_cannot_be_written_says_so(fonts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "closed").mkdir(mode=0o500)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "closed"))
    assert "letters cannot be kept" in message(lambda: images(fonts, "train", 50))


@pytest.mark.slow  # it looks into every font of the system
def test_the_systems_typefaces_give_a_data_set():
    try:
        letters._find_typefaces(FONT_FOLDER, letters._key_of(FONT_FOLDER))
    except DataError as error:
        pytest.skip(str(error))
    data = open_data("letters:470")
    assert (len(data.train), len(data.val), len(data.test), len(data.class_names)) == (423, 47, 150, 47)
    assert np.bincount(data.val.targets).tolist() == [1] * 47
