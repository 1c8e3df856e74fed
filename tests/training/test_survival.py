"""What a run survives: kills at any moment, SIGTERM, a full disk, no memory, numbers that are none."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from coatnet.classifier import load
from coatnet.config import OptimizerConfig
from coatnet.errors import DataError, TrainingError
from coatnet.training import checkpoint, update
from coatnet.training import run as run_module
from coatnet.training.loop import train
from coatnet.training.run import Tick
from training.process import HARD, command, environment, finish, kill_after
from training.tiny import MODEL, NO_BATCH_NORM, assert_same_end, config_of, files_of, history_of

TESTS = Path(__file__).parents[1]
linux = pytest.mark.skipif(sys.platform != "linux", reason="signals, mounts and limits as Linux has them")


@linux
@pytest.mark.parametrize(
    ("precision", "kills"),
    [
        ("fp32", 3),
        pytest.param("bf16", 25, marks=pytest.mark.slow),
        pytest.param("fp32", 25, marks=pytest.mark.slow),
    ],
)
def test_kills_at_any_moment_change_nothing(precision: str, kills: int, pictures: Path, tmp_path: Path):
    """The same command, `--resume` in it, started again and again, ends where one that nobody killed does."""
    flags = (*HARD, "--precision", precision, "--epochs", "30", "--resume")
    whole = finish(command(pictures, tmp_path / "whole", *flags))
    assert whole.returncode == 0, whole.stderr
    rng, run, met = random.Random(kills), tmp_path / "killed", 0
    for _ in range(4 * kills):
        met += kill_after(command(pictures, run, *flags), run, rng.uniform(0, 4)) == -signal.SIGKILL
        if met == kills:
            break
    assert met >= min(kills, 3), f"only {met} kills came before the end"
    done = finish(command(pictures, run, *flags))
    assert done.returncode == 0, done.stderr
    assert_same_end(run, tmp_path / "whole")


WRITES = """
    import os, sys
    from pathlib import Path
    from coatnet.training import checkpoint
    from training.test_checkpoint import state_at, update

    WATCHED = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")
    left = [0]

    def watch(event, arguments):
        if event in WATCHED and ".step" in str(arguments):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), 9)

    state = state_at(1)
    later = state_at(2)
    sys.addaudithook(watch)
    for last in range(1, 500):
        run = Path(sys.argv[1]) / str(last)
        if os.fork() == 0:
            checkpoint.save(run, state)
            left[0] = last
            checkpoint.save(run, later)
            checkpoint.save(run, later)
            os._exit(0)
        if os.wait()[1] == 0:
            break
"""


@linux
def test_a_kill_at_each_write_of_a_save_leaves_a_good_checkpoint(tmp_path: Path):
    """Step 1 is there; the next save makes step 2, the third replaces it; each is cut at its first, second .. write."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(WRITES), str(tmp_path)],
        cwd=TESTS, env=environment(), check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    runs = sorted(tmp_path.iterdir(), key=lambda run: int(run.name))
    assert len(runs) > 30, f"{len(runs)} moments were tried"
    for run in runs:
        newest, damage = checkpoint.find_newest(run, keeps_average=True)
        assert newest is not None, f"killed at write {run.name}: {damage}"
        assert not damage, f"killed at write {run.name}"


@linux
def test_sigterm_leaves_a_checkpoint_and_status_0(pictures: Path, tmp_path: Path):
    flags = (*HARD, "--epochs", "40")
    whole = finish(command(pictures, tmp_path / "whole", *flags))
    assert whole.returncode == 0, whole.stderr
    run = tmp_path / "run"
    start_s = time.perf_counter()
    assert kill_after(command(pictures, run, *flags), run, 3.0, signal.SIGTERM) == 0
    assert time.perf_counter() - start_s < 30, "the grace time of Slurm and Kubernetes"
    assert checkpoint.find_newest(run)[0] is not None
    assert load(run).labels == ("bird", "fish", "frog")
    done = finish(command(pictures, run, *flags, "--resume"))
    assert done.returncode == 0, done.stderr
    assert_same_end(run, tmp_path / "whole")


def test_sigterm_in_an_evaluation_gives_it_up_and_it_is_made_later(pictures: Path, tmp_path: Path, monkeypatch: Any):
    settings: dict[str, Any] = {"checkpoint_interval_s": 1e9}
    train(config_of(pictures, tmp_path / "whole", **settings))
    look, calls = run_module.Run.look_at, []

    def look_at(self: Any, *arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return look(self, *arguments)

    monkeypatch.setattr(run_module.Run, "look_at", look_at)
    config = config_of(pictures, tmp_path / "stopped", **settings)
    stopped = train(config)
    assert stopped.stopped_by == signal.SIGTERM
    assert (stopped.summary, len(calls)) == (None, 1), "nothing is looked at in the grace time"
    assert not (tmp_path / "stopped" / "metrics.jsonl").exists()
    assert train(config, start="resume").stopped_by is None
    assert_same_end(tmp_path / "stopped", tmp_path / "whole")


@pytest.fixture
def small_disk(tmp_path: Path):
    """Mount 20 MB of memory as a disk."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "none", folder], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill(hog: Path) -> None:
    """Write to a disk until it is full."""
    handle = os.open(hog, os.O_WRONLY | os.O_CREAT)
    try:
        while True:
            os.write(handle, bytes(4096))
    except OSError:
        assert os.fstatvfs(handle).f_bavail == 0, "it is full now"
    finally:
        os.close(handle)


@linux
def test_a_full_disk_costs_checkpoints_and_not_the_run(small_disk: Path, pictures: Path, tmp_path: Path):
    settings: dict[str, Any] = {"checkpoint_interval_s": 1e-9}
    train(config_of(pictures, tmp_path / "whole", **settings))
    run, hog = small_disk / "run", small_disk / "hog"
    messages: list[str] = []

    def listen(tick: Tick) -> None:
        messages.extend([tick.message] if tick.message else [])
        if tick.message is None and tick.step == 3:
            fill(hog)
        elif tick.message is None and tick.step == 7:
            hog.unlink()
            newest, damage = checkpoint.find_newest(run)
            assert newest is not None
            assert newest.name <= "step-00000003", "the last good one is intact"
            assert damage == []

    train(config_of(pictures, run, **settings), progress=listen)
    told = [message for message in messages if "could not be written" in message]
    assert any("the checkpoint of step 4" in message for message in told), messages
    assert all("Make room" in message and "MiB are free" in message for message in told)
    assert not list((run / "checkpoints").glob(".*")), "nothing half-written is left"
    assert_same_end(run, tmp_path / "whole")


def poisoned(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Have the loss of these updates be no number, its gradients with it."""
    honest, calls = update.loss_of, iter(range(10_000))

    def loss_of(*arguments: Any) -> Tensor:
        loss = honest(*arguments)
        return loss * float("nan") if next(calls) in steps else loss

    monkeypatch.setattr(update, "loss_of", loss_of)


def test_an_update_without_numbers_is_skipped_and_counted(pictures: Path, tmp_path: Path, monkeypatch: Any):
    poisoned(monkeypatch, {3, 6})
    messages: list[str | None] = []
    result = train(config_of(pictures, tmp_path / "run"), progress=lambda tick: messages.append(tick.message))
    assert sum("update skipped" in (message or "") for message in messages) == 2
    assert "step 4: loss nan, gradient norm nan: update skipped" in messages
    assert [row.get("num_skipped") for row in history_of(tmp_path / "run")] == [1, 2]
    assert json.loads((tmp_path / "run" / "record.json").read_text())["figures"]["num_skipped"] == 2
    for tensor in result.classifier.network.state_dict().values():
        assert torch.isfinite(tensor).all(), "nothing of it is left in weights or statistics"


def test_numbers_that_stay_none_stop_the_run_at_the_last_good_checkpoint(
    pictures: Path, tmp_path: Path, monkeypatch: Any
):
    poisoned(monkeypatch, set(range(5, 10_000)))
    config = config_of(pictures, tmp_path / "run", num_epochs=20, checkpoint_interval_s=1e-9)
    with pytest.raises(TrainingError, match=r"Step 15: the loss is nan at rate \S+, gradient norm nan") as stop:
        train(config)
    assert "10 updates in a row" in str(stop.value)
    assert "--peak-lr" in str(stop.value)
    assert "step-00000004" in str(stop.value), "step 5 was never seen to give a number"
    newest, damage = checkpoint.find_newest(tmp_path / "run")
    assert newest is not None
    assert (newest.name, damage) == ("step-00000004", [])
    assert json.loads((tmp_path / "run" / "model" / "model.json").read_text())["extra"]["step"] == 4


def test_a_rate_too_high_names_what_broke_first(pictures: Path, tmp_path: Path):
    optimizer = OptimizerConfig(peak_lr=1e20, schedule="constant", max_grad_norm=None)
    config = config_of(pictures, tmp_path / "run", optimizer=optimizer, holdout_percent=None, num_epochs=10)
    with pytest.raises(TrainingError, match=r"First to be no number: the (output|weight|gradient) ") as stop:
        train(config)
    assert "There is no checkpoint from before" in str(stop.value)


def no_memory_above(monkeypatch: pytest.MonkeyPatch, size: int) -> list[int]:
    """Have larger microbatches ask the allocator for more than any machine has, in the middle of their work.

    A limit on the address space would do the same to all of torch, whose own ways out of that corrupt memory.
    """
    honest, seen = update.loss_of_batch, list[int]()

    def loss_of_batch(run: Any, micro: Any) -> Tensor:
        seen.append(len(micro))
        loss = honest(run, micro)
        if len(micro) > size:
            loss = loss + torch.empty(1 << 50, dtype=torch.uint8).sum()
        return loss

    monkeypatch.setattr(update, "loss_of_batch", loss_of_batch)
    return seen


@pytest.mark.parametrize("frozen", [True, False])
def test_less_memory_means_smaller_pieces_of_the_same_update(
    frozen: bool, pictures: Path, tmp_path: Path, monkeypatch: Any
):
    settings: dict[str, Any] = {"model": NO_BATCH_NORM if frozen else MODEL, "num_epochs": 1}
    train(config_of(pictures, tmp_path / "whole", **settings))
    seen = no_memory_above(monkeypatch, 3)
    messages: list[str] = []
    train(config_of(pictures, tmp_path / "run", **settings), progress=lambda tick: messages.append(tick.message or ""))
    assert seen[:6] == [12, 6, 3, 3, 3, 3], "halved twice, then four pieces an update"
    told = [message for message in messages if "memory ran out" in message]
    assert len(told) == 2
    assert all(("BatchNorm" in message) != frozen for message in told)
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["figures"]["microbatch_size"] == 3
    if frozen:
        for mine, theirs in zip(history_of(tmp_path / "run"), history_of(tmp_path / "whole"), strict=True):
            assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_a_picture_that_does_not_fit_alone_is_told(pictures: Path, tmp_path: Path, monkeypatch: Any):
    no_memory_above(monkeypatch, 0)
    with pytest.raises(TrainingError, match=r"with 1 pictures of .* at once, and fewer cannot be taken"):
        train(config_of(pictures, tmp_path / "run"))


BROKEN_OFF = """
    import gc
    import weakref
    import torch
    from coatnet.training.update import running_out

    class Saved:  # by hooks, as checkpointing has them
        def __init__(self, tensor):
            self.tensor = tensor
            held.add(self)

    def fail(_gradient):
        raise RuntimeError("can't allocate memory")

    def break_off():
        x = torch.ones(4, requires_grad=True)
        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            ready, bad = (x * x).sum(), (x * x) * 1.0
            bad.register_hook(fail)
            loss = bad.sum() + ready
        assert held
        with running_out() as met:
            loss.backward()
        print(met)

    held = weakref.WeakSet()
    break_off()
    gc.collect()
    print(len(held), "held")
"""


def test_what_a_broken_backward_pass_left_is_let_go():
    done = finish([sys.executable, "-c", textwrap.dedent(BROKEN_OFF)])
    assert "can't allocate memory" in done.stdout, done.stderr
    assert "0 held" in done.stdout, done.stdout
    assert done.returncode == 0, f"the process ended with {done.returncode}"


def test_only_the_asked_checkpoints_stay(pictures: Path, tmp_path: Path):
    config = config_of(pictures, tmp_path / "run", checkpoint_interval_s=1e-9, keep_last=1, keep_every=3, num_epochs=2)
    train(config)
    kept = sorted(folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-00000003", "step-00000006", "step-00000009"]


def test_the_best_checkpoint_stays(pictures: Path, tmp_path: Path):
    train(config_of(pictures, tmp_path / "run", keep_last=1, keep_best=True, num_epochs=4))
    rows = history_of(tmp_path / "run")
    best = max(rows, key=lambda row: row["val_top1_percent"])
    kept = sorted(int(folder.name[5:]) for folder in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == sorted({best["step"], rows[-1]["step"]})


def test_a_run_with_no_whole_checkpoint_does_not_quietly_begin_anew(pictures: Path, tmp_path: Path):
    config = config_of(pictures, tmp_path / "run", checkpoint_interval_s=1e-9)
    train(config)
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        (folder / "manifest.json").unlink()
    before = files_of(tmp_path / "run")
    with pytest.raises(TrainingError, match=r"None of the 2 checkpoints of .* is whole"):
        train(config, start="resume")
    assert files_of(tmp_path / "run") == before


def test_other_pictures_than_at_the_start_are_noticed(pictures: Path, tmp_path: Path):
    data = shutil.copytree(pictures, tmp_path / "pictures")
    config = config_of(data, tmp_path / "run", num_epochs=0.5)
    train(config)
    (data / "bird" / "000.png").write_bytes((data / "bird" / "000.png").read_bytes() + b"x")
    with pytest.raises(DataError, match=r"are not those that .* was begun with"):
        train(config, start="resume")
