from __future__ import annotations

from pathlib import Path

import pytest

from cli.shell import shell
from coatnet import cli
from training.tiny import write_pictures


class Said:
    """What a command line printed, and its exit status."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]):
    def run(*tokens: object) -> Said:
        status = cli.run([str(token) for token in tokens])
        return Said(status, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return sixty PNGs of three classes, one of which is no picture."""
    folder = write_pictures(tmp_path_factory.mktemp("user") / "pictures")
    (folder / "fish" / "007.png").write_bytes(b"not a picture")
    return folder


@pytest.fixture(scope="session")
def trained(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Train by the command; return the run folder and what was printed."""
    run = tmp_path_factory.mktemp("runs") / "first"
    done = shell(
        "train", str(pictures), "--out", str(run), "--model", "coatnet_pico", "--epochs", "8", "--batch-size", "12",
        "--device", "cpu", "--precision", "fp32", OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return run, done.stdout


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
