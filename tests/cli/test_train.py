"""`coatnet train` as a user meets it: what it prints, its exit status, and what it leaves."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import coatnet
from cli.shell import shell
from training.tiny import write_pictures


def test_train_leaves_a_whole_run_and_says_what_and_why(trained: tuple[Path, str]):
    run, out = trained
    assert {path.name for path in run.iterdir()} == {
        "config.json", "split.json", "start.json", "run_manifest.json", "metrics.jsonl", "checkpoints", "model",
        "evaluation.json", "report.html",
        "record.json",
    }  # fmt: skip
    for line in (
        "image size 24 px: the pictures are 24 x 24",
        "recipe tiny_pictures:",
        "1 files could not be read; the report lists them.",
        f"report: {run}/report.html",
        f"use it: coatnet predict {run} IMAGES",
    ):
        assert line in out
    assert re.search(r"^epoch \S+  training loss \d\.\d+  validation loss \d\.\d+  top-1 [\d.]+ %$", out, re.M)
    assert re.search(r"^top-1 [\d.]+ % \(.+\) on \d val pictures$", out, re.M)
    report = (run / "report.html").read_text()
    assert "fish/007.png" in report
    assert "http" not in re.sub(r"http://www.w3.org/\S+", "", report), "it opens without a network"


def test_fine_tuning_on_other_classes_and_another_size(trained: tuple[Path, str], tmp_path: Path, say):
    other = write_pictures(tmp_path / "other", classes=("cat", "dog"), per_class=12, size=(40, 40))
    said = say("train", other, "--out", tmp_path / "tuned", "--init", trained[0], "--epochs", 1, "--freeze", "S2")
    assert said.status == 0, said.err
    assert f"model coatnet_pico: that of {trained[0]}" in said.out
    assert "the classifier starts anew: 2 classes" in said.out
    assert "bias tables were interpolated to (40, 40) px" in said.out
    assert coatnet.load(tmp_path / "tuned").labels == ("cat", "dog")


@pytest.mark.usefixtures("workplace")
def test_overwrite_and_resume_by_name(pictures: Path, say):
    quick = ("--model", "coatnet_pico", "--epochs", 0.5, "--batch-size", 12, "--json")
    first = say("train", pictures, *quick)
    assert (first.status, json.loads(first.out)["run"]) == (0, "runs/pictures")
    again = say("train", pictures, *quick)
    assert again.status == 1
    assert "runs/pictures is there already. Give --resume" in again.err
    assert say("train", pictures, *quick, "--overwrite").status == 0
    for tokens in (("--resume",), (pictures, "--resume"), (f"{pictures}/", "--resume", "--out", "runs/pictures")):
        said = say("train", *tokens)
        assert said.status == 0, said.err
        assert "resuming runs/pictures" in said.out
    said = say("train", pictures, *quick, "--resume")
    assert said.status == 0, "the same command, whatever was there"
    assert "resuming runs/pictures" in said.err
    said = say("train", pictures, *quick, "--resume", "--out", "another")
    assert said.status == 0, "and where nothing was"
    assert json.loads(said.out)["run"] == "another"
    assert "was trained on" in say("train", "elsewhere", "--resume", "--out", "runs/pictures").err


@pytest.mark.usefixtures("workplace")
def test_a_restart_goes_on_with_its_own_run_alone(pictures: Path, say, monkeypatch: pytest.MonkeyPatch):
    """torchrun starts a command again that was refused, too: that is no leave to touch a run that was there before."""
    quick = (
        pictures,
        "--out",
        "run",
        "--model",
        "coatnet_pico",
        "--epochs",
        0.5,
        "--batch-size",
        12,
        "--device",
        "cpu",
    )
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")
    assert say("train", *quick).status == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    again = say("train", *quick)
    assert again.status == 0, again.err
    assert "resuming run" in again.out
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "second")
    refused = say("train", *quick)
    assert refused.status == 1
    assert "run is there already. Give --resume" in refused.err


@pytest.mark.usefixtures("workplace")
def test_a_run_is_done_again_and_compared(pictures: Path, say):
    quick = ("--model", "coatnet_pico", "--epochs", 1, "--batch-size", 12, "--mixup", 0.8, "--device", "cpu")
    assert say("train", pictures, "--out", "first", *quick).status == 0
    said = say("train", "--reproduce", "first")
    assert said.status == 0, said.err
    assert "first-again equals first, bit for bit: checkpoints/step-" in said.out
    row = Path("first/metrics.jsonl")
    row.write_text(row.read_text().replace("train_loss", "train_lost"))
    said = say("train", "--reproduce", "first", "--out", "second")
    assert said.status == 1
    assert "second came out otherwise than first: metrics.jsonl." in said.err
    assert say("train", "--reproduce", "first", "--seed", 3).status == 2
    assert say("train", pictures, "--out", "timed", *quick, "--max-time", "1s").status == 0
    assert "ended by the clock" in say("train", "--reproduce", "timed").err


def test_holdout_of_zero_trains_on_everything(pictures: Path, tmp_path: Path, say):
    quick = ("--model", "coatnet_pico", "--epochs", 0.2, "--batch-size", 12, "--holdout", 0)
    said = say("train", pictures, "--out", tmp_path / "run", *quick)
    assert said.status == 0, said.err
    assert "use it: coatnet predict" in said.out
    assert len(json.loads((tmp_path / "run" / "split.json").read_text())["train"]) == 60
    assert json.loads(say("eval", tmp_path / "run", pictures, "--json").out)["part"] == "all"


def test_ctrl_c_leaves_a_usable_run_that_can_be_resumed(pictures: Path, tmp_path: Path):
    """As at a terminal: the signal comes in the middle; the model loads; --resume goes on to the end."""
    run = tmp_path / "run"
    command = [
        sys.executable, "-m", "coatnet", "train", str(pictures), "--out", str(run), "--model", "coatnet_pico",
        "--epochs", "40", "--batch-size", "12", "--device", "cpu",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}  # two wait for each other long
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if line.startswith("epoch "):
                process.send_signal(signal.SIGINT)
                break
        rest, errors = process.stdout.read(), process.stderr.read()
    assert process.returncode == 130, errors
    assert errors == ""
    assert f"Stopped. Go on with: coatnet train --resume --out {run}" in rest
    assert coatnet.load(run).predict(pictures / "bird" / "000.png", k=1)
    done = shell("train", "--resume", "--out", str(run), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert "resumed from step-" in done.stdout
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)), "no evaluation is missing or twice"
    assert steps[-1] == round(40 * 54 / 12)
