"""A flipped bit, a cut, a missing file: found before a weight is used, and the newest good checkpoint is taken."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import coatnet
from coatnet.errors import ModelFileError
from coatnet.files import MANIFEST
from coatnet.training import checkpoint, finish, run_folder
from coatnet.training.loop import train
from coatnet.training.run import Tick
from training.tiny import assert_same_end, config_of, write_pictures
from untrusted.folders import save_model

NUM_FLIPS = 200
NUM_STEPS = 5
CUTS: dict[str, Callable[[bytes], bytes]] = {
    "emptied": lambda _: b"",
    "cut in half": lambda whole: whole[: len(whole) // 2],
    "one byte short": lambda whole: whole[:-1],
    "one byte long": lambda whole: whole + b"\n",
    "all zeros": lambda whole: bytes(len(whole)),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after a few updates, with a checkpoint after each; copied, never changed."""
    folder = tmp_path_factory.mktemp("stopped")
    data = write_pictures(folder / "pictures", per_class=12)

    def stop(tick: Tick) -> None:
        if tick.step >= NUM_STEPS:
            raise RuntimeError("pulled the plug")

    with pytest.raises(RuntimeError, match="plug"):
        train(config_of(data, folder / "run", checkpoint_interval_s=1e-9), progress=stop)
    return folder / "run"


@pytest.fixture
def run(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def checkpoints_of(run: Path) -> list[Path]:
    """Return the newest checkpoint and the one before it."""
    newest = sorted((run / "checkpoints").iterdir(), reverse=True)
    assert len(newest) >= 2, f"only {newest} to choose from"
    return newest[:2]


def files_of(folder: Path) -> list[Path]:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    assert MANIFEST in {file.name for file in files}
    return files


@contextmanager
def changed(file: Path, content: bytes) -> Iterator[None]:
    """Give a file other content for a while."""
    whole = file.read_bytes()
    file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(whole)


def flipped(content: bytes, place: int) -> bytes:
    damaged = bytearray(content)
    damaged[place // 8] ^= 1 << place % 8
    return bytes(damaged)


def flips(folder: Path) -> Iterator[str]:
    """Flip one bit after another, in a file and at a place drawn by lot, and yield in words what was flipped."""
    rng = random.Random(0)
    for _ in range(NUM_FLIPS):
        file = rng.choice(files_of(folder))
        whole = file.read_bytes()
        place = rng.randrange(8 * len(whole))
        with changed(file, flipped(whole, place)):
            yield f"{file.name}, bit {place % 8} of byte {place // 8}"


def is_noticed(folder: Path) -> bool:
    try:
        coatnet.load(folder)
    except ModelFileError:
        return True
    return False


def test_every_flipped_bit_of_a_model_is_noticed(model: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("coatnet.classifier.read_safetensors", lambda _: pytest.fail("a weight was read"))
    unseen = [what for what in flips(model) if not is_noticed(model)]
    assert not unseen, f"{NUM_FLIPS - len(unseen)} of {NUM_FLIPS} flips were noticed; unseen: {unseen}"
    monkeypatch.undo()
    coatnet.load(model)


def test_a_checkpoint_with_a_flipped_bit_is_passed_over(run: Path):
    newest, before = checkpoints_of(run)
    unseen: list[str] = []
    for what in flips(newest):
        found, notes = checkpoint.find_newest(run, keeps_average=True)
        if found != before or len(notes) != 1 or newest.name not in notes[0]:
            unseen.append(what)
    assert not unseen, f"{NUM_FLIPS - len(unseen)} of {NUM_FLIPS} flips were noticed; unseen: {unseen}"
    assert checkpoint.find_newest(run, keeps_average=True) == (newest, [])


@pytest.mark.parametrize("cut", CUTS)
def test_files_of_another_length_are_noticed(cut: str, model: Path, run: Path):
    newest, before = checkpoints_of(run)
    for file in files_of(model):
        with changed(file, CUTS[cut](file.read_bytes())):
            assert is_noticed(model), f"{file.name} {cut}"
    for file in files_of(newest):
        with changed(file, CUTS[cut](file.read_bytes())):
            assert checkpoint.find_newest(run, keeps_average=True)[0] == before, f"{file.name} {cut}"


def test_files_that_are_missing_or_changed_places_are_noticed(model: Path, run: Path):
    newest, before = checkpoints_of(run)
    for folder in (model, newest):
        files = files_of(folder)
        for file, other in zip(files, files[1:] + files[:1], strict=True):
            aside = file.rename(folder.parent.parent / "aside")
            for content in (None, other.read_bytes()):
                if content is not None:
                    file.write_bytes(content)
                what = f"{file.name} {'is gone' if content is None else f'has the bytes of {other.name}'}"
                if folder == model:
                    assert is_noticed(model), what
                else:
                    assert checkpoint.find_newest(run, keeps_average=True)[0] == before, what
            aside.rename(file)
    assert checkpoint.find_newest(run, keeps_average=True) == (newest, [])


def test_a_file_of_another_save_is_noticed(run: Path):
    newest, before = checkpoints_of(run)
    for file in files_of(newest):
        with changed(file, (before / file.name).read_bytes()):
            assert checkpoint.find_newest(run, keeps_average=True)[0] == before, f"{file.name} of {before.name}"


def test_a_manifest_is_held_to_its_bytes(model: Path):
    """Space that changes nothing for a reader of JSON is damage all the same."""
    file = model / MANIFEST
    whole = file.read_bytes()
    for content in (
        whole.replace(b"\n", b"\r\n"),
        whole + b"\n",
        whole.replace(b": ", b":\t"),
        whole.replace(b"  ", b""),
    ):
        assert content != whole
        with changed(file, content), pytest.raises(ModelFileError, match="not as it was written"):
            coatnet.load(model)
    coatnet.load(model)


def test_with_every_checkpoint_damaged_there_is_none(run: Path):
    for folder in (run / "checkpoints").iterdir():
        (folder / MANIFEST).unlink()
    found, notes = checkpoint.find_newest(run, keeps_average=True)
    assert found is None
    assert len(notes) == len(list((run / "checkpoints").iterdir()))


def test_a_run_resumed_past_a_damaged_checkpoint_ends_where_it_would_have(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Bit for bit, with a plain message about what was passed over."""
    monkeypatch.setattr(finish, "write_report", lambda file, **_facts: file.write_text("report"))
    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    newest, before = checkpoints_of(run)
    weights = max(files_of(newest), key=lambda file: file.stat().st_size)
    weights.write_bytes(flipped(weights.read_bytes(), 12_345))
    heard: list[str] = []
    for folder in (run, whole):
        config = replace(run_folder.read_config(folder), out=str(folder))
        train(config, start="resume", progress=lambda tick: heard.append(tick.message or ""))
    assert any(f"{weights.name} is damaged" in message for message in heard), heard
    assert any(f"resumed from {before.name}" in message for message in heard), heard
    assert_same_end(run, whole)
