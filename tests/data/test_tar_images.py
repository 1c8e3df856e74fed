"""Shards are a set of pictures as a folder is: same pixels, same order, same errors; and a tar cannot do anything."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from coatnet.config import AugmentConfig, PreprocessingConfig
from coatnet.data import tar_index
from coatnet.data.decode import MAX_FILE_BYTES
from coatnet.data.folders import labelled_folder
from coatnet.data.image_sets import ImageSet
from coatnet.data.loader import EvaluationLoader, TrainLoader
from coatnet.data.sources import measure, name_of, open_data
from coatnet.data.transforms import Augmentation, Preprocessing
from coatnet.errors import BadImageError, ConfigError, DataError
from data.large import write_shard, write_shards


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "coatnet" / "tar-index"


def png(colour: int = 7, side: int = 8) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), colour, dtype=np.uint8)).save(out, "PNG")
    return out.getvalue()


def names(images: ImageSet) -> list[str]:
    return [images.name(index) for index in range(len(images))]


def message(data: object, kind: type[Exception] = DataError) -> str:
    with pytest.raises(kind) as met:
        open_data(str(data))
    assert "\n" not in str(met.value)
    return str(met.value)


def same_pictures(found: ImageSet, want: ImageSet) -> None:
    assert found.class_names == want.class_names
    np.testing.assert_array_equal(found.targets, want.targets)
    for index in range(len(want)):
        assert found.size(index) == want.size(index)
        np.testing.assert_array_equal(found.read(index), want.read(index))


def test_shards_hold_what_the_folder_does(make_folder, tmp_path: Path):
    folder = make_folder({"ant": 9, "bee": 6})
    data = open_data(write_shards(folder, tmp_path / "shards"), holdout_percent=None)
    same_pictures(data.train, labelled_folder(folder))
    assert names(data.train)[6:8] == ["train-000.tar/00006.png", "train-001.tar/00007.png"]
    assert measure(data.train) == (8, 10)


def test_a_tar_of_class_folders_is_taken_as_it_is(make_folder, tmp_path: Path):
    folder = make_folder({"ant": 3, "bee": 2})
    subprocess.run(["tar", "--sort=name", "-cf", tmp_path / "all.tar", "-C", folder, "."], check=True)
    data = open_data(tmp_path / "all.tar", holdout_percent=None)
    same_pictures(data.train, labelled_folder(folder))
    assert names(data.train)[0] == "all.tar/ant/000.png"


@pytest.mark.parametrize(
    "labels",
    [
        [{"cls": 0}, {"cls": 2}, {"cls": 2}],
        [{"json": {"label": 0, "text": "x"}}, {"json": {"label": 2}}, {"json": {"label": 2}}],
        [{"json": {"label": "0"}}, {"json": {"label": "2"}}, {"json": {"label": "2"}}],
        [{"txt": "0\n"}, {"txt": " 2 "}, {"txt": "2"}],
        [{"cls": 0, "json": {"label": 1}, "txt": "4"}, {"cls": 2}, {"cls": 2, "json": {}}],
    ],
    ids=["cls", "json", "json of names", "txt", "cls first"],
)
def test_labels_are_told_as_webdataset_tells_them(labels: list[dict], tmp_path: Path):
    samples = [{"__key__": f"a/{n}", "PNG" if n else "png": png(), **told} for n, told in enumerate(labels)]
    images = open_data(write_shard(tmp_path / "a.tar", samples), holdout_percent=None).train
    assert [images.class_names[target] for target in images.targets] == ["0", "2", "2"]


def test_numbers_without_names_mean_what_they_mean(tmp_path: Path):
    write_shard(tmp_path / "s/a.tar", [{"__key__": str(n), "png": png(), "cls": n} for n in (1, 3)])
    assert open_data(tmp_path / "s", holdout_percent=None).class_names == ("0", "1", "2", "3")
    for file, text in (("classes.json", '["w", "x", "y", "z", "more"]'), ("classes.txt", "w\nx\ny\nz\nother\n\n")):
        (tmp_path / "s" / file).write_text(text)
        images = open_data(tmp_path / "s", holdout_percent=None).train
        assert [images.class_names[target] for target in images.targets] == ["x", "z"]
    assert images.class_names[-1] == "other", "classes.txt goes first"
    (tmp_path / "s/classes.txt").write_text("w\nx\ny\n")
    assert "has the class 3, which training lacks (w, x, y)" in message(tmp_path / "s")
    for bad in ("w\n\nx\n", "w\nw\n", "w\n"):
        (tmp_path / "s/classes.txt").write_text(bad)
        assert "classes.txt must list two or more names" in message(tmp_path / "s")
    (tmp_path / "s/classes.txt").unlink()
    (tmp_path / "s/classes.json").write_text("{")
    assert "classes.json cannot be read" in message(tmp_path / "s")


def test_what_is_no_sample_is_passed_over(tmp_path: Path):
    """Metadata, notes, hidden files, pictures under longer endings: as WebDataset has it."""
    samples = [
        {"__key__": "__meta__/info", "png": png(), "cls": 9},
        {"__key__": "a.left", "png": png(), "cls": 9},  # the key is "a", the endings are left.png and left.cls
        {"__key__": "b", "png": png(), "cls": 0},
        {"__key__": "notes", "txt": "of no picture"},
        {"__key__": "c", "png": png(), "cls": 1},
        {"__key__": "._c", "png": b"left by a Mac", "cls": 9},
    ]
    data = open_data(write_shard(tmp_path / "a.tar", samples), holdout_percent=None)
    assert names(data.train) == ["a.tar/b.png", "a.tar/c.png"]


@pytest.mark.parametrize("place", ["{}-000.tar", "{}/000.tar", "imagenet-{}-000.tar"])
def test_parts_are_told_by_names(place: str, make_folder, tmp_path: Path):
    folder, data = make_folder({"ant": 4, "bee": 4}), tmp_path / "shards"
    for part, number in (("train", 8), ("validation", 3), ("test", 2)):
        shard = write_shards(folder, tmp_path / part, per_shard=number) / "train-000.tar"
        (data / place.format(part)).parent.mkdir(parents=True, exist_ok=True)
        shard.rename(data / place.format(part))
    found = open_data(data)
    assert (len(found.train), len(found.val), len(found.test), found.split) == (8, 3, 2, None)
    assert found.val.class_names == found.train.class_names == ("0", "1")
    assert names(found.test)[0] == place.format("test") + "/00000.png"
    with pytest.raises(DataError, match="has a val part now"):
        open_data(data, split={"train": [], "val": []})


def test_a_split_is_seeded_kept_and_followed(make_folder, tmp_path: Path):
    shards = write_shards(make_folder({"ant": 20, "bee": 20}), tmp_path / "shards")
    first, second = open_data(shards), open_data(shards, seed=1)
    assert (len(first.train), len(first.val)) == (36, 4)
    assert first.split["val"] != second.split["val"]
    (tmp_path / "moved").mkdir()
    (shards).rename(tmp_path / "moved/shards")
    for place in ("moved/shards", "moved/shards/train-{000..005}.tar", "moved/shards/*.tar"):
        again = open_data(tmp_path / place, seed=9, split=first.split)
        assert (names(again.train), names(again.val)) == (first.split["train"], first.split["val"]), place
    (tmp_path / "moved/shards/train-002.tar").unlink()
    with pytest.raises(DataError, match=r"train-002.tar/000\d\d.png is gone"):
        open_data(tmp_path / "moved/shards", split=first.split)


def test_patterns_mean_files(make_folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shards = write_shards(make_folder({"ant": 20, "bee": 20}), tmp_path / "shards")
    for pattern, number in (
        ("train-{000..002}.tar", 21), ("train-00[12].tar", 14), (f"train-000.tar::{shards}/train-{{002,005}}.tar", 19),
    ):  # fmt: skip
        assert len(open_data(f"{shards}/{pattern}", holdout_percent=None).train) == number, pattern
    monkeypatch.chdir(tmp_path)
    assert names(open_data("shards/train-005.tar", holdout_percent=None).train)[0] == "train-005.tar/00035.png"
    assert "train-006.tar is not there" in message("shards/train-{005..006}.tar")
    assert "names a shard twice" in message("shards/train-{000,000}.tar")
    assert "no*.tar is not there" in message("shards/no*.tar")
    for server in ("http://a.example/x.tar", "s3://a/x.tar", "pipe:touch pwned #.tar", "file:x.tar"):
        assert "is no file. Copy the shards" in message(server)
    assert not Path("pwned").exists()


@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        ("data/train-{000..146}.tar", "train"), ("data/{0..9}.tar", "data"), ("shards/*.tar", "shards"),
        ("a/pets.tar", "pets"), ("pets-01.tar::pets-02.tar", "pets-01"), ("a/pets", "pets"),
        ("hf:owner/pets", "pets"), ("hf:owner/pets:cats@v1.0", "pets"), ("hf:pets", "pets"), ("fashion-mnist",) * 2,
    ],
)  # fmt: skip
def test_runs_are_called_after_the_data(pattern: str, name: str):
    assert name_of(pattern) == name


def test_folders_that_cannot_be_used_say_why(make_folder, tmp_path: Path):
    folder = make_folder({"ant": 3, "bee": 3})
    shards = write_shards(folder, tmp_path / "s", part="val")
    assert "has shards of val but none of train. Give one part's: " in message(shards)
    assert len(open_data(shards / "val-*.tar", holdout_percent=None).train) == 6, "a pattern means what it names"
    write_shards(folder, shards, part="more")
    assert "has shards of val and beside them more-000.tar" in message(shards)
    (shards / "more-000.tar").rename(shards / "train-test.tar")
    assert "train-test.tar tells two parts, test and train" in message(shards)
    (shards / "train-test.tar").rename(shards / "train.tar.gz")
    assert "is compressed" in message(shards)
    assert "is compressed" in message(shards / "train.tar.gz")
    (folder / "backup.tar").write_bytes(b"beside folders of pictures a tar is none of ours")
    assert len(open_data(folder, holdout_percent=None).train) == 6


def tar_with(path: Path, members: list[tuple[str, bytes, bytes, str]]) -> Path:
    """Write members (name, type, content, link) as a forger would."""
    with tarfile.open(path, "w") as tar:
        for name, kind, content, link in members:
            info = tarfile.TarInfo(name)
            info.type, info.size, info.linkname = kind, len(content), link
            tar.addfile(info, io.BytesIO(content))
    return path


FILE, SYM, HARD, CHR = tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE
ONE = [("ant/1.png", FILE, png(), ""), ("bee/1.png", FILE, png(), "")]
BAD = {  # members of a tar -> what is said of it
    "no picture": ([("a.cls", FILE, b"1", "")], "hold no labelled picture"),
    "no label": ([*ONE, ("2.png", FILE, png(), "")], "2 has no label: add 2.cls"),
    "a label of another kind": ([*ONE, ("ant/2.png", FILE, png(), ""), ("ant/2.cls", FILE, b"1", "")],
                                "'ant' by its folder, a.tar/ant/2.png 1 by its cls"),
    "a number and a name": ([("1.png", FILE, png(), ""), ("1.json", FILE, b'{"label": 1}', ""),
                             ("2.png", FILE, png(), ""), ("2.json", FILE, b'{"label": "b"}', "")], "told alike"),
    "no number": ([("1.png", FILE, png(), ""), ("1.cls", FILE, b"one", "")], "1.cls cannot be read"),
    "below zero": ([("1.png", FILE, png(), ""), ("1.cls", FILE, b"-1", "")], "the label of 1 is -1"),
    "far too high": ([("1.png", FILE, png(), ""), ("1.cls", FILE, b"9" * 30, "")], "the label of 1 is 9999"),
    "a truth value": ([("1.png", FILE, png(), ""), ("1.json", FILE, b'{"label": true}', "")], "is True"),
    "two lines": ([("1.png", FILE, png(), ""), ("1.txt", FILE, b"a\nb", "")], "a name in one line"),
    "a nest": ([("1.png", FILE, png(), ""), ("1.json", FILE, b"[" * 100_000, "")], "1.json cannot be read"),
    "a long label": ([("1.png", FILE, png(), ""), ("1.txt", FILE, bytes(2**21), "")], "a label 1048576 at most"),
    "two pictures": ([("1.png", FILE, png(), ""), ("1.jpg", FILE, png(), "")], "1 has two pictures, .jpg and .png"),
    "twice": ([*ONE, *ONE], "holds a.tar/ant/1.png twice"),
    "twice in a sample": ([ONE[0], ONE[0]], "duplicate file name"),
    "one class": (ONE[:1], "has one class, ant"),
    "a symbolic link": ([*ONE, ("ant/2.png", SYM, b"", "/etc/passwd")], "ant/2.png is a link or a device"),
    "a hard link": ([*ONE, ("ant/2.png", HARD, b"", "../../x.png")], "ant/2.png is a link or a device"),
    "a device": ([*ONE, ("ant/2.png", CHR, b"", "")], "ant/2.png is a link or a device"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_shards_that_cannot_be_used_say_why(what: str, tmp_path: Path):
    members, said = BAD[what]
    assert said in message(tar_with(tmp_path / "a.tar", members))


def test_a_cut_or_damaged_shard_is_named(make_folder, tmp_path: Path):
    shards = write_shards(make_folder({"ant": 9, "bee": 6}), tmp_path / "shards")
    content = (shards / "train-001.tar").read_bytes()
    for end in (0, 100, 512, 700, 1024, 1536, len(content) // 2, len(content) // 1024 * 512):
        (shards / "train-001.tar").write_bytes(content[:end])
        met = message(shards)
        assert "train-001.tar: " in met
        assert "cut short" in met, f"cut at {end}: {met}"
    (shards / "train-001.tar").write_bytes(content[:1100] + b"\xff" * 9 + content[1109:])
    assert "train-001.tar: the header at byte 1024 is damaged" in message(shards)


def test_a_sparse_member_is_refused(tmp_path: Path):
    with (tmp_path / "1.png").open("wb") as file:
        file.write(png())
        file.truncate(2**20)
    for fmt in ("gnu", "posix"):
        command = ["tar", "--sparse", f"--format={fmt}", "-cf", tmp_path / "a.tar", "-C", tmp_path, "1.png"]
        if subprocess.run(command).returncode:
            pytest.skip("this tar stores no holes")
        if (tmp_path / "a.tar").stat().st_size > 2**19:
            pytest.skip("this file system keeps no holes")
        assert "stored with holes" in message(tmp_path / "a.tar")


WATCHED = """
import os, sys
from pathlib import Path
changes = []
def watch(event, arguments):
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        changes.append(str(arguments[0]))
    elif event in ("os.mkdir", "os.rename", "os.remove", "os.link", "os.symlink", "os.mknod", "os.truncate"):
        changes.append(str(arguments[0]))
    elif event in ("os.system", "subprocess.Popen", "socket.connect"):
        changes.append(f"{event} {arguments}")
import webdataset
from coatnet.data.sources import open_data
sys.addaudithook(watch)
images = open_data(sys.argv[1], holdout_percent=None).train
for index in range(len(images)):
    images.read(index)
print(len(images), images.class_names, sep="\\n")
cache = os.environ["XDG_CACHE_HOME"]
assert changes, "the index was not kept"
assert all(change.startswith(cache) for change in changes), changes
"""


def test_no_member_leaves_the_tar(tmp_path: Path):
    """Names of places outside, links, devices: only names. Nothing is written but the index, and nothing run."""
    members = [
        ("/etc/ant/1.png", FILE, png(1), ""), ("../../../bee/2.png", FILE, png(2), ""),
        ("bee/../../../root/cat/3.png", FILE, png(3), ""), ("ant/link", SYM, b"", "/etc"),
        ("ant/link/4.png", FILE, png(4), ""), ("passwd", HARD, b"", "/etc/passwd"), ("sda", CHR, b"", ""),
        ("pipe", tarfile.FIFOTYPE, b"", ""), ("ant/5.pyd", FILE, b"cos\nsystem\n(S'touch pwned'\ntR.", ""),
        ("ant/5.png", FILE, png(5), ""),
    ]  # fmt: skip
    place = tmp_path / "deep/deeper"
    place.mkdir(parents=True)
    tar_with(place / "a.tar", members)
    before = sorted(tmp_path.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(place / "a.tar")],
        cwd=place, env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["5", "('ant', 'bee', 'cat', 'link')"]
    after = sorted(path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "cache"))
    assert after == before


def test_a_picture_that_cannot_be_read_is_bad_and_no_more(tmp_path: Path):
    samples = [{"__key__": f"{n:02d}", "png": png(n) if n != 3 else b"no picture", "cls": n % 2} for n in range(12)]
    shards = write_shard(tmp_path / "s/train.tar", samples).parent
    images = open_data(shards, holdout_percent=None).train
    with pytest.raises(BadImageError, match=r"^train.tar/03.png: damaged, or not a picture"):
        images.read(3)
    assert measure(images) == (8, 8)
    loader = train_loader(images)
    batches = list(loader.batches(0, 4))
    assert list(loader.bad_images) == ["train.tar/03.png"]
    assert all(len(batch) == 6 for batch in batches), "its place is taken by the next"
    with (shards / "train.tar").open("ab") as file:
        file.write(b"more")
    with pytest.raises(BadImageError, match=r"train\.tar has changed since it was looked at"):
        images.read(0)
    (shards / "train.tar").unlink()
    with pytest.raises(BadImageError, match=r"^train.tar/00.png: cannot be read \(No such file"):
        images.size(0)


def test_a_picture_of_any_claimed_size_is_not_read(tmp_path: Path):
    """A member of 300 MiB, in a file with a hole there: refused before its bytes are."""
    info = tarfile.TarInfo("ant/1.png")
    info.size = 300 * 2**20
    with (tmp_path / "a.tar").open("wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.seek(info.size, os.SEEK_CUR)
        tar_with(tmp_path / "b.tar", ONE[1:])
        file.write((tmp_path / "b.tar").read_bytes())
    images = open_data(tmp_path / "a.tar", holdout_percent=None).train
    with pytest.raises(BadImageError, match=f"300 MiB, at most {MAX_FILE_BYTES // 2**20} MiB are read"):
        images.read(0)
    assert images.read(1).shape == (8, 8, 3)


def train_loader(images: ImageSet, **changes: object) -> TrainLoader:
    preprocessing = PreprocessingConfig(image_size=(8, 8), fit="resize")
    augmentation = Augmentation(AugmentConfig(crop="pad", randaugment_ops=2, randaugment_magnitude=9.0), preprocessing)
    return TrainLoader(images, augmentation, **{"seed": 0, "global_batch_size": 6, **changes})  # pyright: ignore


def test_order_and_draws_are_the_folders_for_any_ranks_and_workers(make_folder, tmp_path: Path):
    folder = make_folder({"ant": 9, "bee": 6})
    images = open_data(write_shards(folder, tmp_path / "shards", per_shard=4), holdout_percent=None).train
    want = list(train_loader(labelled_folder(folder)).batches(0, 5))
    for num_ranks, num_workers in ((1, 0), (2, 0), (1, 1)):
        loaders = [
            train_loader(images, rank=rank, num_ranks=num_ranks, num_workers=num_workers) for rank in range(num_ranks)
        ]
        parts = zip(*(loader.batches(2, 5) for loader in loaders), strict=True)  # entered at step 2, as a resumed run
        for step, shares in enumerate(parts, 2):
            for name in ("images", "targets", "positions", "epochs"):
                found = torch.cat([getattr(share, name) for share in shares])
                assert found.equal(getattr(want[step], name)), f"{num_ranks} ranks, {num_workers} workers: {name}"
    preprocessing = Preprocessing(PreprocessingConfig(image_size=(8, 8), fit="resize"))
    seen = [batch.targets for batch in EvaluationLoader(images, preprocessing, batch_size=4, num_workers=0)]
    assert torch.cat(seen).tolist() == images.targets.tolist()


def test_the_index_is_kept_until_a_shard_changes(make_folder, tmp_path: Path, cache: Path, monkeypatch):
    shards = write_shards(make_folder({"ant": 9, "bee": 6}), tmp_path / "shards")
    first = open_data(shards)
    (kept,) = cache.iterdir()
    reads: list[str] = []
    real = tar_index._read_shard
    monkeypatch.setattr(tar_index, "_read_shard", lambda shard: reads.append(shard.name) or real(shard))
    assert open_data(shards).split == first.split
    assert reads == [], "the index was made again"
    kept.write_bytes(kept.read_bytes()[:-9])
    assert open_data(shards).split == first.split
    assert len(reads) == 3, "a damaged index was believed"
    os.utime(shards / "train-001.tar", ns=(1, 1))
    open_data(shards)
    assert len(reads) == 6, "a shard changed, its index did not"
    monkeypatch.setattr(tar_index, "private_cache", no_cache)
    assert open_data(shards).split == first.split, "without a cache it goes on"


def no_cache(name: str) -> Path:
    raise OSError(f"{name}: read-only")


def test_a_set_travels_to_workers_small_and_without_open_files(tmp_path: Path):
    samples = [{"__key__": f"{n:06d}", "png": b"x", "cls": n % 2} for n in range(2000)]
    images = open_data(write_shard(tmp_path / "a.tar", samples), holdout_percent=None).train
    content = pickle.dumps(images)
    assert len(content) < 2000 * 70, f"{len(content) / 2000:.0f} bytes a picture"
    assert names(pickle.loads(content).take(np.array([1999, 3]))) == ["a.tar/001999.png", "a.tar/000003.png"]


def test_without_the_package_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write_shard(tmp_path / "a.tar", [{"__key__": str(n), "png": png(), "cls": n} for n in (0, 1)])
    monkeypatch.setitem(sys.modules, "webdataset.tariterators", None)
    monkeypatch.setitem(sys.modules, "webdataset.shardlists", None)
    for data in (tmp_path / "a.tar", tmp_path / "{a,b}.tar"):
        assert "pip install 'coatnet[webdataset]'" in message(data, ConfigError)
