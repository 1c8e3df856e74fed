"""What a wrong command line, a missing file and an unforeseen error are told in."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.shell import shell
from coatnet import cli
from coatnet.errors import ConfigError
from coatnet.evaluation import command as evaluation_command

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
