"""The command line as a user meets it: what it prints, its exit status, and what it leaves."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import coatnet
from coatnet import cli
from coatnet.errors import ConfigError
from coatnet.evaluation import command as evaluation_command
from training.tiny import CLASSES, write_pictures

COMMANDS = ("models", "plan", "train", "eval", "predict")


def shell(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the program in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "coatnet", *arguments],
        capture_output=True, text=True, cwd=cwd, timeout=500, env={**os.environ, **environment}, check=False,
    )  # fmt: skip


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


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return sixty PNGs of three classes, one of which is no picture."""
    folder = write_pictures(tmp_path_factory.mktemp("user") / "pictures")
    (folder / "fish" / "007.png").write_bytes(b"not a picture")
    return folder


@pytest.fixture(scope="module")
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


def test_fine_tuning_on_other_classes_and_another_size(trained: tuple[Path, str], tmp_path: Path, say):
    other = write_pictures(tmp_path / "other", classes=("cat", "dog"), per_class=12, size=(40, 40))
    said = say("train", other, "--out", tmp_path / "tuned", "--init", trained[0], "--epochs", 1, "--freeze", "S2")
    assert said.status == 0, said.err
    assert f"model coatnet_pico: that of {trained[0]}" in said.out
    assert "the classifier starts anew: 2 classes" in said.out
    assert "bias tables were interpolated to (40, 40) px" in said.out
    assert coatnet.load(tmp_path / "tuned").labels == ("cat", "dog")


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Work in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


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


# What is typed, the exit status, and what the message holds. RUN is a run, PICTURES are pictures.
MISTAKES: list[tuple[str, int, str]] = [
    ("train", 2, "Which pictures? Give a folder: coatnet train PICTURES"),
    ("train absent", 1, "absent is not there. Give a folder"),
    ("train PICTURES --out new --model coatnet_O", 2, "There is no model 'coatnet_O'. Did you mean 'coatnet_"),
    ("train PICTURES --out new --recipe tiny_picture", 2, "Did you mean 'tiny_pictures'?"),
    ("train PICTURES --out new --image-size big", 2, "An image size of 'big' cannot be read. Give it like 224"),
    ("train PICTURES --out new --max-time soon", 2, "A time of 'soon' cannot be read. Give it like 90s, 20m or 1.5h"),
    ("train PICTURES --out new --label-smoothing 2", 2, "label_smoothing is 2.0. It must be at least 0 and below 1"),
    ("train PICTURES --out new --init absent", 1, "absent is no run, model folder, .safetensors or .pt file"),
    ("train PICTURES --out new --init RUN --model coatnet_nano", 1, "tensors are of another network"),
    ("train PICTURES --out new --mixup 0.8 --batch-size 13", 2, "Mixing takes pictures in pairs"),
    ("train PICTURES --out new --holdout 0 --patience 2", 2, "no picture of"),
    ("train PICTURES --out new --on-bad-image stop --epochs 1 --model coatnet_pico", 1, "fish/007.png"),
    ("train --resume --overwrite", 2, "--resume and --overwrite exclude each other"),
    ("train --resume --out RUN --epochs 3.5 --batch-size 4", 2, "begun with another num_epochs, global_batch_size"),
    ("train --resume", 1, "There is no run below runs/"),
    ("train --resume --out PICTURES", 1, "holds no run"),
    ("train PICTURES --out PICTURES --overwrite", 1, "is no run folder, so it is left alone"),
    ("eval absent PICTURES", 1, "absent is not there"),
    ("eval RUN absent", 1, "absent is not there"),
    ("eval RUN PICTURES --part test", 1, "has no test part. It has: val, train."),
    ("eval RUN PICTURES --batch-size 0", 2, "The batch size is 0"),
    ("eval RUN PICTURES --workers -1", 2, "workers are -1"),
    ("predict absent PICTURES", 1, "absent is not there"),
    ("predict RUN absent.png", 1, "absent.png: no picture found"),
    ("predict RUN PICTURES --k 0", 2, "k is 0"),
    ("predict RUN PICTURES --device tpu", 2, "There is no device 'tpu'"),
    ("models --image-size 0", 2, "An image size of '0' cannot be read"),
]  # fmt: skip
MISTYPED: list[tuple[str, str]] = [
    ("train PICTURES --epoch 3", "Did you mean --epochs?"),
    ("models --image-siz 3", "Did you mean --image-size?"),
    ("train PICTURES --epochs many", 'unable to convert "many"'),
    ("train PICTURES --freeze S9", "S9"),
    ("modls", "models"),
    ("eval", "--run"),
    ("predict RUN", "--images"),
]


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize(("typed", "status", "message"), MISTAKES, ids=[typed for typed, *_ in MISTAKES])
def test_a_mistake_is_told_in_a_line_or_two(
    typed: str, status: int, message: str, trained: tuple[Path, str], pictures: Path, say
):
    places = {"RUN": str(trained[0]), "PICTURES": str(pictures)}
    said = say(*(places.get(word, word) for word in typed.split()))
    assert said.status == status, said.err
    assert message in said.err
    assert said.err.startswith("coatnet: ")
    assert len(said.err.strip().splitlines()) <= 2
    assert "Traceback" not in said.err
    assert not Path("new/checkpoints").exists()


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize(("typed", "message"), MISTYPED, ids=[typed for typed, _ in MISTYPED])
def test_a_wrong_call_has_status_2(typed: str, message: str, say):
    said = say(*typed.split())
    assert said.status == 2
    assert message in said.err
    assert said.out == ""
    assert not Path("runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_device_that_is_not_there(trained: tuple[Path, str], pictures: Path, say):
    said = say("predict", trained[0], pictures, "--device", "cuda")
    assert said.status == 2
    assert "Device 'cuda' is not at hand here. There is: cpu" in said.err


def test_debug_shows_where(say, tmp_path: Path):
    with pytest.raises(ConfigError, match="Which pictures"):
        cli.run(["train", "--debug"])
    done = shell("--debug", "eval", "absent", "absent", cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "absent is not there" in done.stderr
    assert say("models", "--json", "--debug").status == 0


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(13, "Permission denied", "x.png"), "coatnet: [Errno 13] Permission denied: 'x.png'"),
        (RuntimeError("CUDA out of memory.\nmore"), "coatnet: CUDA out of memory. Give a smaller --microbatch-size"),
        (KeyError("oops"), "coatnet: KeyError: 'oops'. This is not your fault; --debug shows where it arose."),
    ],
)
def test_what_nobody_foresaw_has_no_traceback_either(
    error: Exception, message: str, say, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(evaluation_command, "evaluate_run", fail)
    said = say("eval", "run", "data")
    assert said.status == 1
    assert said.err.startswith(message)
    assert len(said.err.splitlines()) == 1


def test_a_reader_that_goes_away_is_no_error(trained: tuple[Path, str], pictures: Path):
    """`coatnet predict ... | head -1`"""
    command = [sys.executable, "-m", "coatnet", "predict", str(trained[0]), str(pictures / "bird"), "--format", "jsonl"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == ""


def test_models_lists_the_family(say):
    rows = json.loads(say("models", "--json").out)
    assert [row["name"] for row in rows] == coatnet.list_models()
    found = {row["name"]: row for row in rows}
    assert found["coatnet_0"]["num_params"] == 25_036_948
    assert found["coatnet_0"]["paper_top1_percent"] == {"224": 81.6, "384": 83.9, "512": None}
    assert found["coatnet_0"]["image_size"] == [224, 224]
    assert found["coatnet_pico"]["from"] == "this project"
    table = say("models")
    assert table.status == 0
    assert all(row["name"] in table.out for row in rows)


@pytest.mark.parametrize(("size", "params"), [("384", 25_143_028), ("512x512", 25_269_364)])
def test_models_at_another_size(size: str, params: int, say):
    rows = {row["name"]: row for row in json.loads(say("models", "--image-size", size, "--json").out)}
    assert rows["coatnet_0"]["num_params"] == params


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command: str, say):
    said = say(command, "--help")
    assert said.status == 0
    assert re.search(rf"^Example: coatnet {command}", said.out, re.M)


def test_help_and_version(say):
    said = say("--help")
    assert said.status == 0
    assert all(re.search(rf"\b{command}\b", said.out) for command in COMMANDS)
    assert "Start with:  coatnet train PICTURES" in said.out
    assert say().status == 0
    assert coatnet.__version__ in say("--version").out


def test_the_example_of_each_help_can_be_read(say):
    """It parses: what fails is what it names, not how it is called."""
    for command in COMMANDS:
        (line,) = re.findall(r"^Example: coatnet (.*)$", say(command, "--help").out, re.M)
        tokens = [token.strip('"') for token in line.split()]
        _, bound, _ = cli.app.parse_args(tokens, exit_on_error=False, print_error=False)
        assert bound is not None


@pytest.mark.parametrize("tokens", [["--help"], ["models", "--json"], ["plan", "coatnet_7"], ["train", "--help"]])
def test_what_needs_no_torch_loads_none(tokens: list[str]):
    code = (
        f"import sys; from coatnet.cli import run; status = run({tokens}); sys.exit(status or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0


def test_help_comes_at_once():
    """It costs little beside an empty program's help by the same library: CPU time, in turns, the best of five."""
    empty = "import cyclopts; cyclopts.App(help_format='plaintext')(['--help'])"

    def used_s(*arguments: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
        subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before

    turns = [(used_s("-m", "coatnet", "--help"), used_s("-c", empty)) for _ in range(5)]
    ours_s, empty_s = (min(column) for column in zip(*turns, strict=True))
    assert ours_s < 2.5 * empty_s, f"{ours_s:.3f} s, an empty program {empty_s:.3f} s"


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
