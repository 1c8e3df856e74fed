from __future__ import annotations

import gzip
import io
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coatnet.data import fashion_mnist
from coatnet.data.folders import labelled_folder
from coatnet.data.image_sets import ArrayImages
from coatnet.data.sources import list_images, measure, open_data
from coatnet.errors import DataError

needs_fashion_mnist = pytest.mark.skipif(
    not fashion_mnist.SYSTEM_FOLDER.is_dir(), reason="Fashion-MNIST is not installed (Debian: dataset-fashion-mnist)"
)


def names(images) -> list[str]:
    return [images.name(index) for index in range(len(images))]


def test_a_folder_of_classes_is_divided_by_class(make_folder):
    data = open_data(make_folder({"ant": 20, "bee": 10, "cat": 2, "dog": 1}))
    assert data.class_names == ("ant", "bee", "cat", "dog")
    assert np.bincount(data.val.targets, minlength=4).tolist() == [2, 1, 1, 0]
    assert np.bincount(data.train.targets).tolist() == [18, 9, 1, 1]
    assert data.test is None
    assert sorted(names(data.train) + names(data.val)) == names(labelled_folder(Path(data.name)))
    for images in (data.train, data.val):
        wrong = [name for name, target in zip(names(images), images.targets, strict=True)
                 if name.split("/")[0] != data.class_names[target]]  # fmt: skip
        assert not wrong, f"labelled with another class than their folder's: {wrong}"


def test_a_split_is_seeded_and_does_not_depend_on_the_file_systems_order(make_folder, monkeypatch):
    folder = make_folder({"ant": 20, "bee": 20})
    first, second = open_data(folder), open_data(folder, seed=1)
    real = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda self: reversed(list(real(self))))
    assert open_data(folder).split == first.split
    assert second.split["val"] != first.split["val"], "two seeds set the same pictures aside"


def test_a_picture_added_later_leaves_the_others_where_they_were(make_folder):
    folder = make_folder({"ant": 40, "bee": 40})
    before = set(open_data(folder).split["val"])
    shutil.copy(folder / "ant/000.png", folder / "ant/new.png")
    moved = before - set(open_data(folder).split["val"])
    assert len(moved) <= 1, f"{len(moved)} of 8 pictures left val"


def test_a_split_is_followed_to_the_letter(make_folder):
    folder = make_folder({"ant": 5, "bee": 5})
    split = open_data(folder, seed=3).split
    shutil.copy(folder / "ant/000.png", folder / "ant/new.png")
    again = open_data(folder, seed=99, split=split)
    assert (names(again.train), names(again.val), again.split) == (split["train"], split["val"], split)
    (folder / split["train"][0]).unlink()
    with pytest.raises(DataError, match=f"{split['train'][0]} is gone, one of 1 "):
        open_data(folder, split=split)
    with pytest.raises(DataError, match="no 'val'"):
        open_data(folder, split={"train": []})


def test_without_holdout_all_is_training(make_folder):
    data = open_data(make_folder({"ant": 3, "bee": 3}), holdout_percent=None)
    assert (len(data.train), data.val, data.split["val"]) == (6, None, [])
    assert open_data(data.name, split=data.split).val is None


@pytest.mark.parametrize("val", ["val", "valid", "validation"])
def test_a_folder_may_come_divided(make_folder, val):
    make_folder({"ant": 4, "bee": 4}, "d/train")
    make_folder({"bee": 2}, f"d/{val}")
    data = open_data(make_folder({"ant": 1, "bee": 1}, "d/test").parent)
    assert (len(data.train), len(data.val), len(data.test), data.split) == (8, 2, 2, None)
    assert data.val.targets.tolist() == [1, 1], "a class that val lacks shifted its labels"
    assert names(data.val)[0] == f"{val}/bee/000.png"
    with pytest.raises(DataError, match="has a val part now"):
        open_data(data.name, split={"train": [], "val": []})


def test_train_and_test_alone_get_a_val(make_folder):
    make_folder({"ant": 10, "bee": 10}, "d/train")
    data = open_data(make_folder({"ant": 1}, "d/test").parent)
    assert (len(data.train), len(data.val), len(data.test)) == (18, 2, 1)


def test_parts_may_be_written_otherwise(make_folder):
    make_folder({"ant": 4, "bee": 4}, "d/Training")
    data = open_data(make_folder({"ant": 1, "bee": 1}, "d/TEST").parent)
    assert data.class_names == ("ant", "bee"), "the parts were taken for classes"
    assert (len(data.train), len(data.test)) == (6, 2)


def test_a_test_part_without_train_is_not_taken_for_classes(make_folder):
    make_folder({"ant": 1, "bee": 1}, "d/val")
    with pytest.raises(DataError, match="but no train"):
        open_data(make_folder({"ant": 1, "bee": 1}, "d/test").parent)


def test_train_may_be_a_class(make_folder):
    assert open_data(make_folder({"bus": 2, "train": 2})).class_names == ("bus", "train")


def test_any_depth_and_suffix_counts_and_hidden_files_do_not(make_folder):
    folder = make_folder({"ant": 1, "bee": 1, ".cache": 1, "ant/deep/.hidden": 1})
    (folder / "ant/deep/deeper").mkdir()
    shutil.copy(folder / "bee/000.png", folder / "ant/deep/deeper/X.JPeG")
    shutil.copy(folder / "bee/000.png", folder / "ant/._000.png")
    (folder / "bee/notes.txt").write_text("no picture")
    assert names(labelled_folder(folder)) == ["ant/000.png", "ant/deep/deeper/X.JPeG", "bee/000.png"]


def message(call) -> str:
    with pytest.raises(DataError) as met:
        call()
    assert "\n" not in str(met.value)
    return str(met.value)


def test_each_unusable_folder_says_why(make_folder, tmp_path):
    folder = make_folder({"ant": 2, "bee": 2})
    assert "fashion-mnist" in message(lambda: open_data("no-such-thing"))
    assert "no-such-thing is not there" in message(lambda: open_data("no-such-thing"))
    assert "000.png is a file" in message(lambda: open_data(folder / "ant/000.png"))
    assert "000.png lies beside the classes" in message(lambda: open_data(folder / "ant"))
    (folder / "cat").mkdir()
    assert "the class cat holds no picture" in message(lambda: open_data(folder))
    shutil.rmtree(folder / "cat")
    shutil.rmtree(folder / "bee")
    assert "has one class, ant" in message(lambda: open_data(folder))
    (tmp_path / "empty").mkdir()
    assert "holds no picture" in message(lambda: open_data(tmp_path / "empty"))


def test_parts_at_odds_say_why(make_folder):
    make_folder({"ant": 2, "bee": 2}, "d/train")
    folder = make_folder({"wasp": 1}, "d/val").parent
    assert "class wasp, which training lacks (ant, bee)" in message(lambda: open_data(folder))
    make_folder({"ant": 1}, "d/extra")
    assert "beside them extra" in message(lambda: open_data(folder))
    shutil.rmtree(folder / "extra")
    shutil.rmtree(folder / "val")
    make_folder({"ant": 1}, "d/val")
    make_folder({"ant": 1}, "d/valid")
    assert "has val twice" in message(lambda: open_data(folder))


def test_measure_takes_the_median_and_passes_over_bad_files(make_folder):
    folder = make_folder({"ant": 3, "bee": 3})
    Image.new("RGB", (400, 300)).save(folder / "bee/large.png")
    (folder / "bee/bad.png").write_bytes(b"none")
    assert measure(labelled_folder(folder)) == (8, 10)
    for file in folder.rglob("*.png"):
        file.write_bytes(b"none")
    assert "None of 8 pictures" in message(lambda: measure(labelled_folder(folder)))


def test_list_images_takes_files_folders_patterns_and_the_input(make_folder, monkeypatch):
    folder = make_folder({"ant": 2, "bee": 1})
    (folder / "notes.txt").write_text("none")
    one, two, three = (folder / name for name in ("ant/000.png", "ant/001.png", "bee/000.png"))
    assert list_images([str(three)]) == [three]
    assert list_images([str(folder)]) == [one, two, three]
    assert list_images([f"{folder}/*/000.*", f"{folder}/ant"]) == [one, three, one, two]
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{two}\n\n{one}\n"))
    assert list_images(["-"]) == [two, one]
    assert "nothing.jpg: no picture found" in message(lambda: list_images([str(one), "nothing.jpg"]))
    (folder / "none").mkdir()
    assert "none: no picture found" in message(lambda: list_images([str(folder / "none")]))
    assert "No picture was named" in message(lambda: list_images([]))


def test_arrays_show_grey_and_colour():
    labels = np.array([0, 1, 0])
    for shape in ((3, 4, 5), (3, 4, 5, 3)):
        pixels = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
        images = ArrayImages(pixels, labels, ("a", "b"), "train", np.array([2, 1]))
        again = pickle.loads(pickle.dumps(images))
        assert again.read(0).shape == (4, 5, 3)
        assert (again.read(0) == pixels[2].reshape(4, 5, -1)).all()
        assert (again.targets.tolist(), again.name(1), again.size(0)) == ([0, 1], "train/1", (4, 5))


@needs_fashion_mnist
def test_fashion_mnist_opens_by_name():
    data = open_data("fashion-mnist", holdout_percent=100 / 12)
    assert (len(data.train), len(data.val), len(data.test)) == (55_000, 5_000, 10_000)
    assert np.bincount(data.val.targets).tolist() == [500] * 10, "val is not balanced"
    assert not set(data.split["train"]) & set(data.split["val"])
    assert (data.class_names[9], data.class_names[data.test.targets[0]]) == ("Ankle boot", "Ankle boot")
    content = pickle.dumps(data.val)
    assert len(content) < 100_000, f"pickled to {len(content)} bytes"
    np.testing.assert_array_equal(pickle.loads(content).read(7), data.val.read(7))


@pytest.fixture
def away(tmp_path, monkeypatch):
    """Fashion-MNIST of three pictures, on no machine but a home of its own."""
    home = tmp_path / "home"
    home.mkdir()
    hashes = {}
    for name in fashion_mnist.SHA256:
        header = [0, 0, 8, 3, 0, 0, 0, 3, 0, 0, 0, 2, 0, 0, 0, 2] if "images" in name else [0, 0, 8, 1, 0, 0, 0, 3]
        values = range(12) if "images" in name else (4, 9, 4)
        (home / name).write_bytes(gzip.compress(bytes([*header, *values])))
        hashes[name] = fashion_mnist.sha256_of(home / name)
    monkeypatch.setattr(fashion_mnist, "SHA256", hashes)
    monkeypatch.setattr(fashion_mnist, "SYSTEM_FOLDER", tmp_path / "none")
    monkeypatch.setattr(fashion_mnist, "HOMES", (f"file://{tmp_path}/elsewhere/", f"file://{home}/"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return home


def test_fashion_mnist_is_fetched_once(away, tmp_path):
    data = open_data("fashion-mnist")
    assert (len(data.train), len(data.val), len(data.test)) == (2, 1, 3)
    assert data.test.read(1)[:, :, 1].tolist() == [[4, 5], [6, 7]]
    shutil.rmtree(away)
    assert fashion_mnist.find() == tmp_path / "cache/coatnet/fashion-mnist"
    (fashion_mnist.find() / "train-labels-idx1-ubyte.gz").write_bytes(b"damaged")
    fashion_mnist.load.cache_clear()
    assert "train-labels-idx1-ubyte.gz is damaged" in message(lambda: open_data("fashion-mnist"))


def test_fashion_mnist_that_cannot_be_fetched_says_what_to_do(away):
    (away / "t10k-labels-idx1-ubyte.gz").write_bytes(b"something else")
    met = message(lambda: open_data("fashion-mnist"))
    assert "another SHA-256" in met
    shutil.rmtree(away)
    met = message(lambda: open_data("fashion-mnist"))
    for part in ("could not be fetched", "dataset-fashion-mnist", "coatnet.data.embedded"):
        assert part in met, f"{part!r} is not in: {met}"
