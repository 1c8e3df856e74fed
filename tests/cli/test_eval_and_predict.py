"""`coatnet eval` and `coatnet predict` as a user meets them: tables, files, and what comes through a pipe."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from coatnet.evaluation import command as evaluation_command
from training.tiny import CLASSES, write_pictures


def test_eval_of_the_runs_own_folder_uses_what_it_set_apart(trained: tuple[Path, str], pictures: Path, say):
    said = say("eval", trained[0], pictures, "--json")
    assert said.status == 0
    figures = json.loads(said.out)
    recorded = json.loads((trained[0] / "evaluation.json").read_text())
    assert figures["part"] == "val"
    for name in ("n", "top1_percent", "top1_interval", "confusion", "classes"):
        assert figures[name] == recorded[name]
    assert figures["loss"] == pytest.approx(recorded["loss"])
    relative = os.path.relpath(pictures)
    assert json.loads(say("eval", trained[0], relative, "--json").out)["part"] == "val", "however its path is written"


def test_eval_prints_a_table(trained: tuple[Path, str], pictures: Path, say):
    said = say("eval", trained[0], pictures, "--part", "train")
    assert said.status == 0
    assert said.out.startswith("53 pictures (train)")
    for word in ("top-1", "loss", "calibration error", "95 %", *CLASSES):
        assert word in said.out
    assert "could not read fish/007.png" in said.err


def test_eval_of_a_folder_of_another_is_all_of_it(trained: tuple[Path, str], tmp_path: Path, say):
    other = write_pictures(tmp_path / "other", per_class=2, seed=1)
    figures = json.loads(say("eval", trained[0], other, "--json").out)
    assert (figures["part"], figures["n"]) == ("all", 6)


def test_eval_shows_names_as_they_are(trained: tuple[Path, str], tmp_path: Path, say):
    """What looks like markup in a name is a part of it."""
    other = write_pictures(tmp_path / "[red]", per_class=1, seed=1)
    (other / "bird" / "[bold].png").write_bytes((other / "bird" / "000.png").read_bytes())
    said = say("predict", trained[0], other / "bird" / "[bold].png")
    assert said.status == 0
    assert "[bold]" in said.out


def test_eval_refuses_other_classes_with_the_difference(trained: tuple[Path, str], tmp_path: Path, say):
    other = write_pictures(tmp_path / "other", classes=("bird", "fish", "whale"), per_class=2)
    said = say("eval", trained[0], other)
    assert said.status == 1
    assert "it lacks 'frog'; the model does not know 'whale'" in said.err


def test_predict_in_each_form(trained: tuple[Path, str], pictures: Path, say):
    files = [str(pictures / name / "001.png") for name in CLASSES]
    table = say("predict", trained[0], *files)
    assert table.status == 0
    assert all(name in table.out for name in CLASSES)

    rows = list(csv.DictReader(io.StringIO(say("predict", trained[0], *files, "--format", "csv", "--k", "2").out)))
    assert [(row["picture"], row["rank"]) for row in rows] == [(file, rank) for file in files for rank in "12"]
    assert [row["label"] for row in rows if row["rank"] == "1"] == list(CLASSES)
    assert all(0 <= float(row["probability"]) <= 1 for row in rows)

    lines = say("predict", trained[0], *files, "--format", "jsonl").out.splitlines()
    answers = [json.loads(line) for line in lines]
    assert [answer["picture"] for answer in answers] == files
    assert [answer["best"][0]["label"] for answer in answers] == list(CLASSES)


def test_predict_takes_folders_globs_and_standard_input(
    trained: tuple[Path, str], pictures: Path, say, monkeypatch: pytest.MonkeyPatch
):
    def seen(*arguments: object) -> list[str]:
        said = say("predict", trained[0], *arguments, "--format", "jsonl", "--k", 1)
        assert said.status == 0, said.err
        return [json.loads(line)["picture"] for line in said.out.splitlines()]

    assert len(seen(pictures / "bird")) == 20
    assert len(seen(pictures / "*" / "00[0-2].png")) == 9
    files = [str(pictures / "frog" / "003.png"), str(pictures / "bird" / "004.png")]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(files) + "\n"))
    assert seen("-") == files


@pytest.mark.parametrize("form", ["table", "csv", "jsonl"])
def test_predict_goes_on_past_a_bad_file_and_says_so(form: str, trained: tuple[Path, str], pictures: Path, say):
    said = say("predict", trained[0], pictures / "fish", "--format", form)
    assert said.status == 1
    assert "008.png" in said.out, "the good ones after it are answered"
    assert "could not read" in said.err
    assert "007.png" in said.err
    assert said.err.splitlines()[-1] == "coatnet: 1 of the files could not be read; they are named above."


def test_predict_answers_alike_whatever_is_asked_with_it(
    trained: tuple[Path, str], pictures: Path, say, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(evaluation_command, "NUM_SEEN_AT_ONCE", 3)
    few = say("predict", trained[0], pictures / "bird", "--format", "csv").out.splitlines()
    monkeypatch.setattr(evaluation_command, "NUM_SEEN_AT_ONCE", 64)
    many = say("predict", trained[0], pictures / "bird", "--format", "csv").out.splitlines()
    for one, other in zip(few[1:], many[1:], strict=True):
        *words, probability = one.split(",")
        *same_words, same_probability = other.split(",")
        assert words == same_words
        assert float(probability) == pytest.approx(float(same_probability), abs=2e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there(trained: tuple[Path, str], pictures: Path, say):
    said = say("predict", trained[0], pictures, "--device", "cuda")
    assert said.status == 2
    assert "Device 'cuda' is not at hand here. There is: cpu" in said.err


def test_a_reader_that_goes_away_is_no_error(trained: tuple[Path, str], pictures: Path):
    """`coatnet predict ... | head -1`"""
    command = [sys.executable, "-m", "coatnet", "predict", str(trained[0]), str(pictures / "bird"), "--format", "jsonl"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""
