"""The main job by the command, on real pictures: train, evaluate, predict, as `make demo` does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from coatnet.data.embedded import unpack

pytestmark = pytest.mark.slow


def coatnet(*arguments: object) -> str:
    command = [sys.executable, "-m", "coatnet", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_from_pictures_to_predictions(tmp_path: Path):
    """4,000 pictures and two minutes are enough for four of five clothes."""
    pictures, run = tmp_path / "pictures", tmp_path / "run"
    unpack(pictures)
    figures = json.loads(coatnet("train", pictures, "--out", run, "--max-time", "120s", "--json"))
    assert figures["part"] == "test"
    assert figures["n"] == 1000
    assert figures["top1_percent"] > 80
    assert figures["seconds"] < 150
    assert json.loads(coatnet("eval", run, pictures, "--json"))["top1_percent"] == figures["top1_percent"]
    trouser = sorted((pictures / "test").glob("[Tt]rouser*/*.png"))[0]
    (line,) = coatnet("predict", run, trouser, "--k", 1, "--format", "jsonl").splitlines()
    assert json.loads(line)["best"][0]["label"] == trouser.parent.name
    assert (run / "report.html").stat().st_size > 10_000
