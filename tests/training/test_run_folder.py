"""The run folder: never overwritten without a word, and nothing that is no run ever deleted."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from coatnet.data.sources import ArrayImages, DataSet, Split
from coatnet.errors import ModelFileError, TrainingError
from coatnet.training import run_folder
from coatnet.training.loop import train
from training.tiny import MODEL, config_of


def data_of(split: Split | None = None) -> DataSet:
    images = ArrayImages(np.zeros((2, 4, 4), np.uint8), np.arange(2), ("a", "b"), "train", np.arange(2))
    return DataSet("pictures", images, None, None, ("a", "b"), split)


@pytest.fixture
def a_run(tmp_path: Path) -> Path:
    """Return the folder of a run that has begun."""
    config = config_of("pictures", tmp_path / "run")
    run_folder.begin(config, data_of({"train": ["a"], "val": ["b"]}), 1)
    return tmp_path / "run"


def test_a_run_reads_back(a_run: Path):
    assert run_folder.read_config(a_run) == config_of("pictures", a_run)
    assert run_folder.read_split(a_run) == {"train": ["a"], "val": ["b"]}


@pytest.mark.parametrize("name", ["config.json", "split.json", "start.json", "run_manifest.json"])
def test_one_flipped_bit_is_noticed_before_a_run_goes_on(name: str, a_run: Path):
    content = bytearray((a_run / name).read_bytes())
    content[len(content) // 2] ^= 1
    (a_run / name).write_bytes(content)
    with pytest.raises((ModelFileError, TrainingError), match=r"damaged|cannot be read|holds no run|missing|not list"):
        run_folder.read_config(a_run)


def test_a_run_cut_off_at_its_first_moment_is_begun_anew(a_run: Path):
    (a_run / "run_manifest.json").unlink()
    config = config_of("pictures", a_run)
    for start in ("new", "resume"):
        assert run_folder.check(config, start) is False
    assert not run_folder.is_begun(a_run)
    run_folder.begin(config, data_of(), 1)
    assert run_folder.check(config, "resume") is True


def test_a_new_run_takes_an_absent_or_an_empty_folder(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "deep/down/absent"):
        config = config_of("pictures", tmp_path / name)
        run_folder.check(config, "new")
        run_folder.begin(config, data_of(), 1)
        assert run_folder.read_config(tmp_path / name) == config
        assert run_folder.read_split(tmp_path / name) is None


def test_a_run_that_is_there_is_refused_with_the_ways_out(a_run: Path):
    with pytest.raises(TrainingError, match="is there already") as refusal:
        run_folder.check(config_of("other", a_run), "new")
    for way in ("--resume", "--overwrite", "--out"):
        assert way in str(refusal.value)


def test_overwrite_replaces_the_run_whole(a_run: Path):
    (a_run / "checkpoints").mkdir()
    config = config_of("other", a_run)
    run_folder.check(config, "overwrite")
    run_folder.begin(config, data_of(), 1)
    assert {path.name for path in a_run.iterdir()} == {"config.json", "start.json", "run_manifest.json"}
    assert run_folder.read_config(a_run) == config


@pytest.mark.parametrize("start", ["new", "overwrite"])
@pytest.mark.parametrize(
    "files",
    [{"holiday.jpg": "x"}, {"config.json": '{"architectures": ["Bert"]}', "model.bin": "x"}, {"config.json": "["}],
    ids=["pictures", "another program's model", "no JSON"],
)
def test_what_is_no_run_is_never_deleted(start: str, files: dict[str, str], tmp_path: Path):
    folder = tmp_path / "precious"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_text(content)
    with pytest.raises(TrainingError, match="is no run folder, so it is left alone"):
        run_folder.check(config_of("pictures", folder), start)  # type: ignore[arg-type]
    assert {path.name: path.read_text() for path in folder.iterdir()} == files


@pytest.mark.parametrize("start", ["new", "overwrite"])
def test_a_file_is_no_run_folder(start: str, tmp_path: Path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(TrainingError, match="left alone"):
        run_folder.check(config_of("pictures", tmp_path / "file"), start)  # type: ignore[arg-type]


def test_a_run_is_not_overwritten_with_what_it_starts_from(a_run: Path):
    for config in (config_of(a_run / "pictures", a_run), config_of("pictures", a_run, init=str(a_run / "model"))):
        with pytest.raises(TrainingError, match=re.escape(f"lies in {a_run}, which is to be overwritten")):
            run_folder.check(config, "overwrite")


def test_only_a_run_is_resumed(tmp_path: Path):
    with pytest.raises(TrainingError, match="holds no run"):
        run_folder.check(config_of("pictures", tmp_path), "resume")
    with pytest.raises(TrainingError, match="holds no run"):
        run_folder.read_config(tmp_path / "absent")


def test_newest_run(a_run: Path, tmp_path: Path):
    run_folder.begin(config_of("pictures", tmp_path / "second"), data_of(), 1)
    (tmp_path / "no run").mkdir()
    (tmp_path / "no run" / "config.json").write_text("{}")
    os.utime(a_run, (1, 1))
    assert run_folder.newest_run(tmp_path).name == "second"
    with pytest.raises(TrainingError, match="There is no run below"):
        run_folder.newest_run(tmp_path / "no run")


def test_train_refuses_and_overwrites(pictures: Path, tmp_path: Path):
    config = config_of(pictures, tmp_path / "run", num_epochs=0.2)
    train(config)
    with pytest.raises(TrainingError, match="is there already"):
        train(config)
    (tmp_path / "run" / "note.txt").write_text("of the first run")
    train(config, start="overwrite")
    assert not (tmp_path / "run" / "note.txt").exists()


def test_a_failed_overwrite_leaves_the_old_run(pictures: Path, tmp_path: Path):
    train(config_of(pictures, tmp_path / "run", num_epochs=0.2))
    before = json.loads((tmp_path / "run" / "config.json").read_text())
    wrong = config_of(pictures, tmp_path / "run", init=str(tmp_path / "absent"), model=MODEL)
    with pytest.raises(Exception, match="no run, model folder"):
        train(wrong, start="overwrite")
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == before
    assert (tmp_path / "run" / "model" / "model.json").is_file()
