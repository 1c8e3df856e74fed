"""Tables are a set of pictures as a folder is. The datasets library decodes nothing, and its rows are not believed."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import numpy as np
import pytest

from coatnet.data.folders import labelled_folder
from coatnet.data.image_sets import ImageSet
from coatnet.data.sources import measure, open_data
from coatnet.errors import BadImageError, ConfigError, DataError
from data.large import write_table


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(tmp_path / "hf"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf/datasets")
    return tmp_path / "hf"


def names(images: ImageSet) -> list[str]:
    return [images.name(index) for index in range(len(images))]


def message(data: object, kind: type[Exception] = DataError) -> str:
    with pytest.raises(kind) as met:
        open_data(str(data))
    assert "\n" not in str(met.value)
    return str(met.value)


def write_rows(place: Path, columns: dict[str, list[Any]], kinds: dict[str, Any] | None = None) -> Path:
    """Write a parquet file of these columns; return its folder."""
    features = datasets.Features(kinds) if kinds else None
    place.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(columns, features=features).to_parquet(place)
    return place.parent


@pytest.fixture
def pixels(make_folder) -> list[bytes]:
    return [file.read_bytes() for file in sorted(make_folder({"ant": 3, "bee": 3}, "few").rglob("*.png"))]


@pytest.mark.parametrize("prefix", ["", "hf:"])
def test_a_folder_of_parquet_holds_what_the_folder_does(prefix: str, make_folder, tmp_path: Path):
    folder = make_folder({"ant": 9, "bee": 6})
    table = write_table(folder, tmp_path / "table")
    found, want = open_data(f"{prefix}{table}", holdout_percent=None).train, labelled_folder(folder)
    assert found.class_names == want.class_names
    np.testing.assert_array_equal(found.targets, want.targets)
    for index in range(len(want)):
        np.testing.assert_array_equal(found.read(index), want.read(index))
    assert measure(found) == (8, 10)
    assert names(found)[:2] == ["train/0", "train/1"]


def test_splits_are_parts(make_folder, tmp_path: Path):
    for split, counts in (
        ("train", {"ant": 4, "bee": 4}),
        ("validation", {"ant": 1, "bee": 2}),
        ("test", {"ant": 1, "bee": 1}),
    ):
        write_table(make_folder(counts, split), tmp_path / "t", split=split)
    data = open_data(tmp_path / "t")
    assert (len(data.train), len(data.val), len(data.test), data.split) == (8, 3, 2, None)
    assert data.val.targets.tolist() == [0, 1, 1]
    (tmp_path / "t/data/train-00000-of-00001.parquet").unlink()
    assert "has validation, test but no train" in message(tmp_path / "t")


def test_a_split_of_its_rows_is_seeded_and_followed(make_folder, tmp_path: Path):
    table = write_table(make_folder({"ant": 20, "bee": 20}), tmp_path / "t")
    first = open_data(table)
    assert (len(first.train), len(first.val)) == (36, 4)
    table.rename(tmp_path / "moved")
    again = open_data(tmp_path / "moved", seed=5, split=first.split)
    assert (names(again.train), names(again.val)) == (first.split["train"], first.split["val"])
    write_table(make_folder({"ant": 10, "bee": 10}, "fewer"), tmp_path / "moved")
    with pytest.raises(DataError, match=r"train/\d+ is gone"):
        open_data(tmp_path / "moved", split=first.split)


CLASS = datasets.ClassLabel(names=["x", "y"])
KINDS: dict[str, tuple[list[Any], Any, list[str]]] = {
    "numbers": ([0, 2, 2, 0, 2, 2], datasets.Value("int64"), ["0", "2"]),
    "small numbers": ([0, 2, 2, 0, 2, 2], datasets.Value("uint8"), ["0", "2"]),
    "names": (["b", "a", "a", "b", "a", "a"], datasets.Value("string"), ["b", "a"]),
    "classes": ([1, 0, 0, 1, 0, 0], CLASS, ["y", "x"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_names_or_numbers(kind: str, pixels: list[bytes], tmp_path: Path):
    labels, feature, want = KINDS[kind]
    kinds = {"image": datasets.Image(), "label": feature}
    table = write_rows(tmp_path / "t/train.parquet", {"image": [{"bytes": p} for p in pixels], "label": labels}, kinds)
    images = open_data(table, holdout_percent=None).train
    assert [images.class_names[target] for target in images.targets][:2] == want
    assert len(images.class_names) == (3 if "numbers" in kind else 2)


@pytest.mark.parametrize("kind", ["bytes", "records"])
def test_plain_parquet_without_the_librarys_notes_will_do(kind: str, pixels: list[bytes], tmp_path: Path):
    cells = pixels if kind == "bytes" else [{"bytes": content, "path": None} for content in pixels]
    table = write_rows(tmp_path / "t/a.parquet", {"img": cells, "label": ["ant", "bee"] * 3, "width": [1] * 6})
    images = open_data(table, holdout_percent=None).train
    assert images.read(5).shape == (8, 10, 3)


def test_of_several_columns_of_classes_the_finest_counts(pixels: list[bytes], tmp_path: Path):
    kinds = {"img": datasets.Image(), "coarse": CLASS, "fine": datasets.ClassLabel(names=["p", "q", "r"])}
    columns = {"img": [{"bytes": p} for p in pixels], "coarse": [0, 1] * 3, "fine": [0, 1, 2] * 2}
    assert open_data(write_rows(tmp_path / "t/a.parquet", columns, kinds)).class_names == ("p", "q", "r")


def test_tables_that_cannot_be_used_say_why(pixels: list[bytes], tmp_path: Path):
    place, cells = tmp_path / "t/train.parquet", [{"bytes": content, "path": None} for content in pixels]
    for columns, said in (
        ({"a": [1] * 6, "label": [0, 1] * 3}, "no column of pictures that stands out among a, label"),
        ({"image": cells, "a": [0, 1] * 3}, "no column of labels among image, a"),
        ({"image": cells, "label": [0.5, 1.0] * 3}, "label is of the kind float64"),
        ({"image": cells, "label": [[0], [1]] * 3}, "label is of the kind"),
        ({"image": cells, "label": [0, 1, None] * 2}, "label is -1 to 1, with 2 untold"),
        ({"image": cells, "label": [-1] * 6}, "no label is told in train"),
        ({"image": cells, "label": [1] * 6}, "has one class, 1"),
        ({"image": cells, "label": [0, 10**12] * 3}, "label is 0 to 1000000000000"),
    ):
        assert said in message(write_rows(place, columns)), columns["label" if "label" in columns else "a"]
    place.write_bytes(b"no parquet")
    assert "cannot be opened" in message(tmp_path / "t")


def test_a_test_split_without_labels_is_no_part(pixels: list[bytes], tmp_path: Path):
    kinds = {"image": datasets.Image(), "label": CLASS}
    cells = [{"bytes": content} for content in pixels]
    write_rows(tmp_path / "t/train-0.parquet", {"image": cells, "label": [0, 1] * 3}, kinds)
    data = open_data(write_rows(tmp_path / "t/test-0.parquet", {"image": cells, "label": [-1] * 6}, kinds))
    assert data.test is None


def test_a_part_with_other_classes_is_refused(pixels: list[bytes], tmp_path: Path):
    cells = [{"bytes": content, "path": None} for content in pixels]
    write_rows(tmp_path / "t/train-0.parquet", {"image": cells, "label": ["ant", "bee"] * 3})
    table = write_rows(tmp_path / "t/test-0.parquet", {"image": cells, "label": ["ant", "wasp"] * 3})
    assert "test, has the class wasp, which training lacks (ant, bee)" in message(table)


def test_a_row_may_name_a_file_of_the_data_and_no_other(pixels: list[bytes], tmp_path: Path, cache: Path):
    (cache / "downloads").mkdir(parents=True)
    for place in (cache / "downloads/in.png", tmp_path / "out.png"):
        place.write_bytes(pixels[0])
    (cache / "link.png").symlink_to(tmp_path / "out.png")
    paths = [str(cache / "downloads/in.png"), str(tmp_path / "out.png"), str(cache / "../out.png"),
             str(cache / "link.png"), "/etc/passwd", None]  # fmt: skip
    cells = [{"bytes": None, "path": path} for path in paths]
    table = write_rows(tmp_path / "t/a.parquet", {"image": cells, "label": [0, 1] * 3})
    images = open_data(table, holdout_percent=None).train
    assert images.read(0).shape == (8, 10, 3)
    for index in range(1, 5):
        with pytest.raises(BadImageError, match=f"^train/{index}: names a file outside of the data"):
            images.read(index)
    with pytest.raises(BadImageError, match="train/5: the row holds no picture"):
        images.read(5)


def test_what_else_the_library_reads_is_taken_through_it(make_folder):
    folder = make_folder({"ant": 3, "bee": 3})
    images = open_data(f"hf:{folder}", holdout_percent=None).train
    assert images.class_names == ("ant", "bee")
    np.testing.assert_array_equal(images.read(0), labelled_folder(folder).read(0))


def test_pictures_are_decoded_here(pixels: list[bytes], tmp_path: Path):
    """What the library would decode (a TIFF) or fail on in its own way is a bad picture like any other."""
    cells = [{"bytes": content} for content in (*pixels[:4], b"II*\0 a tiff", b"none")]
    kinds = {"image": datasets.Image(), "label": CLASS}
    images = open_data(write_rows(tmp_path / "t/a.parquet", {"image": cells, "label": [0, 1] * 3}, kinds)).train
    bad = [index for index in range(len(images)) if images.name(index) in ("train/4", "train/5")]
    for index in bad:
        with pytest.raises(BadImageError, match="not a picture of a known kind"):
            images.read(index)


def test_a_table_travels_to_workers_as_the_name_of_its_file(make_folder, tmp_path: Path):
    images = open_data(write_table(make_folder({"ant": 60, "bee": 60}), tmp_path / "t"), holdout_percent=None).train
    content = pickle.dumps(images)
    assert len(content) < 6000, f"pickled to {len(content)} bytes"
    np.testing.assert_array_equal(pickle.loads(content).take(np.array([7])).read(0), images.read(7))


def test_a_file_that_changed_is_read_anew(make_folder, tmp_path: Path):
    table = write_table(make_folder({"ant": 3, "bee": 3}), tmp_path / "t")
    assert len(open_data(table, holdout_percent=None).train) == 6
    write_table(make_folder({"ant": 4, "cat": 4}, "other"), table)
    data = open_data(table, holdout_percent=None)
    assert (len(data.train), data.class_names) == (8, ("ant", "cat"))


def test_names_that_are_none_say_so():
    for name in ("a/b/c", "a:b:c", "//x", ""):
        assert "is no name on the hub. Give hf:owner/name" in message(f"hf:{name}")


def test_a_hub_that_is_out_of_reach_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    said = message("hf:owner/name:subset@v1.0")
    assert said.startswith("owner/name:subset@v1.0: Couldn't reach 'owner/name' on the Hub")
    assert "Fetch it once where there is a network, or give a folder of its parquet files" in said


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'coatnet[hub]'" in message("hf:owner/name", ConfigError)
