"""The loop: the same run twice, stopped and resumed, in microbatches, in time, and what ends it early."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from coatnet.classifier import load
from coatnet.config import OptimizerConfig, PreprocessingConfig
from coatnet.data import fashion_mnist
from coatnet.errors import BadImageError, ConfigError, DataError
from coatnet.training import checkpoint, loop, run
from coatnet.training.loop import train
from coatnet.training.run import Tick
from training.tiny import (
    AUGMENT,
    CLASSES,
    MODEL,
    NO_BATCH_NORM,
    SIZE,
    assert_same_end,
    config_of,
    history_of,
    write_pictures,
)

EVERYTHING: dict[str, Any] = {  # whatever draws or keeps something between updates
    "model": replace(MODEL, stochastic_depth_rate=0.3),
    "augment": AUGMENT,
    "optimizer": OptimizerConfig(method="muon", peak_lr=1e-3, warmup_steps=2),
    "ema_decay": 0.9,
    "label_smoothing": 0.1,
    "checkpoint_interval_s": 1e-9,
}


def stop_after(step: int, stop: Callable[[], None]) -> Callable[[Tick], None]:
    def listen(tick: Tick) -> None:
        if tick.step == step and tick.message is None:
            stop()

    return listen


def pull_the_plug() -> None:
    raise RuntimeError("pulled the plug")


def test_same_config_same_run(pictures: Path, tmp_path: Path):
    for name in ("one", "two"):
        train(config_of(pictures, tmp_path / name, **EVERYTHING))
    assert_same_end(tmp_path / "one", tmp_path / "two")


def test_another_seed_another_run(pictures: Path, tmp_path: Path):
    for seed in (0, 1):
        train(config_of(pictures, tmp_path / str(seed), seed=seed, num_epochs=0.5))
    losses = [history_of(tmp_path / str(seed))[-1]["train_loss"] for seed in (0, 1)]
    assert losses[0] != losses[1]


GOLDEN = {  # of seeded runs, made in float32 on one thread; other instruction sets differ by 2e-4
    "adamw": (
        {"step": 5, "lr": 0.00243712, "train_loss": 1.08084, "val_loss": 0.45880},
        {"step": 9, "lr": 0.00015805, "train_loss": 0.97324, "val_loss": 0.30122},
    ),
    "muon": (
        {"step": 5, "lr": 0.00081363, "train_loss": 1.10648, "val_loss": 0.83682},
        {"step": 9, "lr": 0.00005902, "train_loss": 1.02982, "val_loss": 0.71788},
    ),
}


@pytest.mark.parametrize(("method", "peak_lr"), [("adamw", 3e-3), ("muon", 1e-3)])
def test_golden_losses(method: Any, peak_lr: float, pictures: Path, tmp_path: Path):
    """A change of the mathematics shows here; another CPU's rounding does not."""
    optimizer = OptimizerConfig(method=method, peak_lr=peak_lr, warmup_steps=2)
    train(config_of(pictures, tmp_path / "run", **EVERYTHING | {"optimizer": optimizer}))
    for row, want in zip(history_of(tmp_path / "run"), GOLDEN[method], strict=True):
        for name, value in want.items():
            assert row[name] == pytest.approx(value, rel=2e-3), f"step {row['step']}: {name}"


def test_it_learns(pictures: Path, tmp_path: Path):
    result = train(config_of(pictures, tmp_path / "run", num_epochs=8))
    assert result.summary is not None
    assert result.summary.top1_percent == 100, "colours tell these classes apart"
    answers = result.classifier.predict(sorted(pictures.glob("*/000.png")), k=1)
    assert [answer[0].label for answer in answers] == list(CLASSES)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("step", [2, 5, 8], ids=["first epoch", "at an evaluation", "second epoch"])
def test_resumed_after_an_error_is_uninterrupted(precision: str, step: int, pictures: Path, tmp_path: Path):
    """An error at update n leaves the checkpoint of n - 1; what follows equals the run that nothing broke."""
    settings = {**EVERYTHING, "precision": precision}
    train(config_of(pictures, tmp_path / "whole", **settings))
    broken = config_of(pictures, tmp_path / "broken", **settings)
    with pytest.raises(RuntimeError, match="plug"):
        train(broken, progress=stop_after(step, pull_the_plug))
    newest, _ = checkpoint.find_newest(tmp_path / "broken")
    assert newest is not None
    assert newest.name == f"step-{step - 1:08d}"
    messages: list[str | None] = []
    train(broken, start="resume", progress=lambda tick: messages.append(tick.message))
    assert f"resumed from step-{step - 1:08d}" in messages
    assert_same_end(tmp_path / "broken", tmp_path / "whole")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_resumed_after_ctrl_c_is_uninterrupted(precision: str, pictures: Path, tmp_path: Path):
    settings = {**EVERYTHING, "precision": precision, "checkpoint_interval_s": 1e9}
    train(config_of(pictures, tmp_path / "whole", **settings))
    stopped = config_of(pictures, tmp_path / "stopped", **settings)
    before = signal.getsignal(signal.SIGINT)
    result = train(stopped, progress=stop_after(6, lambda: os.kill(os.getpid(), signal.SIGINT)))
    assert result.was_interrupted
    assert signal.getsignal(signal.SIGINT) is before, "Ctrl-C is the caller's again"
    assert load(tmp_path / "stopped").predict(np.zeros((9, 9, 3), np.uint8), k=1)
    assert [row["step"] for row in history_of(tmp_path / "stopped")] == [5]
    assert not train(stopped, start="resume").was_interrupted
    assert_same_end(tmp_path / "stopped", tmp_path / "whole")


def test_a_damaged_newest_checkpoint_costs_no_more_than_its_steps(pictures: Path, tmp_path: Path):
    train(config_of(pictures, tmp_path / "whole", **EVERYTHING))
    broken = config_of(pictures, tmp_path / "broken", **EVERYTHING)
    with pytest.raises(RuntimeError, match="plug"):
        train(broken, progress=stop_after(7, pull_the_plug))
    newest, _ = checkpoint.find_newest(tmp_path / "broken")
    assert newest is not None
    (newest / "ema.safetensors").write_bytes(b"")
    messages: list[str] = []
    train(broken, start="resume", progress=lambda tick: messages.append(tick.message or ""))
    assert any("step-00000006" in message and "damaged" in message for message in messages)
    assert "resumed from step-00000005" in messages
    assert_same_end(tmp_path / "broken", tmp_path / "whole")


def test_nothing_to_resume_from_begins_anew(pictures: Path, tmp_path: Path):
    settings = {**EVERYTHING, "checkpoint_interval_s": 1e9}
    train(config_of(pictures, tmp_path / "whole", **settings))
    broken = config_of(pictures, tmp_path / "broken", **settings)
    with pytest.raises(RuntimeError, match="plug"):
        train(broken, progress=stop_after(3, pull_the_plug))
    messages: list[str | None] = []
    train(broken, start="resume", progress=lambda tick: messages.append(tick.message))
    assert "no checkpoint to resume from: begun anew" in messages
    assert_same_end(tmp_path / "broken", tmp_path / "whole")


def test_resuming_a_run_that_is_done_trains_no_more(pictures: Path, tmp_path: Path):
    config = config_of(pictures, tmp_path / "run", num_epochs=0.5)
    train(config)
    before = (tmp_path / "run" / "model" / "model.safetensors").read_bytes()
    steps: list[int] = []
    result = train(config, start="resume", progress=lambda tick: steps.append(tick.step))
    assert set(steps) == {2}
    assert not result.was_interrupted
    assert (tmp_path / "run" / "model" / "model.safetensors").read_bytes() == before


def test_microbatches_equal_the_whole_batch(pictures: Path, tmp_path: Path):
    """Without BatchNorm, with every draw on: mixing's pairs, stochastic depth and the mean over the global batch."""
    model = replace(NO_BATCH_NORM, stochastic_depth_rate=0.3)
    for name, size in (("whole", None), ("pieces", 4)):
        settings = {**EVERYTHING, "model": model, "microbatch_size": size, "num_epochs": 1}
        train(config_of(pictures, tmp_path / name, **settings))
    assert_close_end(tmp_path / "pieces", tmp_path / "whole")


def test_mixing_ends_after_its_share(pictures: Path, tmp_path: Path):
    """Two epochs of four or five updates: the first as where all is mixed, the second as where nothing is."""
    for name, change in (("all", {}), ("half", {"mix_share": 0.5}), ("none", {"mix_share": 0.0})):
        train(config_of(pictures, tmp_path / name, **EVERYTHING | {"augment": replace(AUGMENT, **change)}))
    plain = replace(AUGMENT, mixup_alpha=None, cutmix_alpha=None)
    train(config_of(pictures, tmp_path / "plain", **EVERYTHING | {"augment": plain}))
    assert_same_end(tmp_path / "none", tmp_path / "plain")
    whole, half = ([row["train_loss"] for row in history_of(tmp_path / name)] for name in ("all", "half"))
    assert half[0] == whole[0]
    assert half[1] < whole[1], "soft targets of two classes keep the loss up"


def assert_close_end(found: Path, want: Path) -> None:
    """Hold two runs to the same losses and answers, up to the rounding of float32."""
    for mine, theirs in zip(history_of(found), history_of(want), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    images = torch.randint(0, 256, (8, 3, *SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(load(found).logits(images), load(want).logits(images), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("setting", ["activation_checkpointing", "workers"])
@pytest.mark.slow
def test_how_it_is_computed_changes_nothing(setting: str, pictures: Path, tmp_path: Path):
    change: dict[str, Any] = {"activation_checkpointing": True} if setting != "workers" else {"num_workers": 2}
    train(config_of(pictures, tmp_path / "plain", **EVERYTHING))
    train(config_of(pictures, tmp_path / "other", **EVERYTHING, **change))
    assert_same_end(tmp_path / "other", tmp_path / "plain")


@pytest.mark.slow
def test_compiled_network_trains_alike(pictures: Path, tmp_path: Path):
    for name, compiled in (("plain", False), ("compiled", True)):
        train(config_of(pictures, tmp_path / name, compile=compiled, num_epochs=0.5))
    mine, theirs = (history_of(tmp_path / name)[-1] for name in ("compiled", "plain"))
    assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-3)


class Clock:
    """A clock that moves by a fixed time at each look."""

    def __init__(self, step_s: float) -> None:
        self.now_s, self.step_s = 0.0, step_s

    def perf_counter(self) -> float:
        self.now_s += self.step_s
        return self.now_s


@pytest.mark.parametrize("warmup_steps", [0, 4, 1000])
def test_max_time_ends_the_run_with_its_schedule(
    warmup_steps: int, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of 10,000 epochs there is time for some 40 updates: the rate climbs to the peak, without a jump, and down."""
    monkeypatch.setattr(run, "time", Clock(0.125))
    rates: list[float] = []
    optimizer = OptimizerConfig(peak_lr=3e-3, min_lr=0.0, warmup_steps=warmup_steps)
    config = config_of(pictures, tmp_path / "run", optimizer=optimizer, num_epochs=10_000, max_time_s=10.0)

    def listen(tick: Tick) -> None:
        if tick.message is None:
            rates.append(tick.learning_rate)

    result = train(config, progress=listen)
    assert 10.0 <= result.seconds < 12.0
    assert not result.was_interrupted
    assert len(rates) > 20
    peak = rates.index(max(rates))
    assert rates[peak] >= 0.9 * 3e-3, "the warm-up ends in time, however long it was meant to be"
    assert peak <= 0.3 * len(rates)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] < 0.02 * 3e-3, "the schedule is at its end"
    assert max(abs(a - b) for a, b in zip(rates[peak:], rates[peak + 1 :], strict=False)) < 0.2 * 3e-3, "no jump"


def test_a_time_too_short_for_one_update_still_leaves_a_model(pictures: Path, tmp_path: Path):
    result = train(config_of(pictures, tmp_path / "run", max_time_s=1e-9))
    assert history_of(tmp_path / "run")[-1]["step"] == 1
    assert result.summary is not None


def test_rates_of_a_run_by_updates(pictures: Path, tmp_path: Path):
    """Update n of 9, of which 2 warm up: (n + 1)/2 of the peak, then the cosine of what has passed of the other 7."""
    rates: dict[int, float] = {}
    optimizer = OptimizerConfig(peak_lr=1e-3, min_lr=1e-5, warmup_steps=2)
    train(
        config_of(pictures, tmp_path / "run", optimizer=optimizer),
        progress=lambda tick: rates.setdefault(tick.step - 1, tick.learning_rate),
    )
    want = [5e-4, 1e-3] + [1e-5 + 99e-5 * (1 + math.cos(math.pi * (n - 2) / 7)) / 2 for n in range(2, 9)]
    assert [rates[n] for n in range(9)] == pytest.approx(want)


ACCURACIES = (10.0, 50.0, 40.0, 45.0, 50.0, 60.0, 70.0)  # validation's, evaluation by evaluation


@pytest.fixture
def told_accuracies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have validation find what ACCURACIES says."""
    told = iter(ACCURACIES)
    monkeypatch.setattr(loop, "summarise", lambda _outcome: SimpleNamespace(loss=1.0, top1_percent=next(told)))


def step_of_model(folder: Path) -> int:
    return json.loads((folder / "model" / "model.json").read_text())["extra"]["step"]


@pytest.mark.usefixtures("told_accuracies")
def test_patience_ends_the_run_and_keeps_the_best(pictures: Path, tmp_path: Path):
    config = config_of(pictures, tmp_path / "run", num_epochs=20, patience_epochs=2)
    result = train(config)
    history = history_of(tmp_path / "run")
    assert [row["val_top1_percent"] for row in history] == [10, 50, 40, 45], "two epochs without improvement"
    assert step_of_model(tmp_path / "run") == history[1]["step"]
    assert not result.was_interrupted
    steps: list[int] = []
    train(config, start="resume", progress=lambda tick: steps.append(tick.step))
    assert set(steps) == {history[-1]["step"]}, "resumed, it is still over"


@pytest.mark.usefixtures("told_accuracies")
def test_ctrl_c_does_not_replace_the_best(pictures: Path, tmp_path: Path):
    config = config_of(pictures, tmp_path / "run", num_epochs=20, patience_epochs=3)
    stop = stop_after(16, lambda: signal.raise_signal(signal.SIGINT))
    assert train(config, progress=stop).was_interrupted
    assert step_of_model(tmp_path / "run") == history_of(tmp_path / "run")[1]["step"]


@pytest.mark.usefixtures("told_accuracies")
def test_without_patience_the_last_is_kept(pictures: Path, tmp_path: Path):
    train(config_of(pictures, tmp_path / "run", num_epochs=3))
    assert step_of_model(tmp_path / "run") == history_of(tmp_path / "run")[-1]["step"]


def test_patience_without_validation_is_refused(pictures: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no picture .* is set apart"):
        train(config_of(pictures, tmp_path / "run", patience_epochs=2, holdout_percent=None))


def test_callback_hears_the_run(pictures: Path, tmp_path: Path):
    ticks: list[Tick] = []
    train(config_of(pictures, tmp_path / "run"), progress=ticks.append)
    plain = [tick for tick in ticks if tick.message is None]
    assert [tick.step for tick in plain] == list(range(1, 10))
    assert {tick.num_steps for tick in ticks} == {9}
    assert plain[-1].epoch == pytest.approx(9 * 12 / 54)
    assert all(tick.images_per_s > 0 and tick.eta_s >= 0 and tick.learning_rate > 0 for tick in plain)
    assert plain[-1].eta_s == 0
    assert all(tick.loss is not None and 0 < tick.loss < 5 for tick in plain)
    events = [tick.message for tick in ticks if tick.message is not None]
    assert [event.split()[0] for event in events] == ["epoch", "epoch", "looking"]
    assert "top-1" in events[0]


def test_run_folder_holds_everything(pictures: Path, tmp_path: Path):
    result = train(config_of(pictures, tmp_path / "run"))
    inside = {path.name for path in (tmp_path / "run").iterdir()}
    assert inside == {
        "config.json", "split.json", "start.json", "run_manifest.json", "metrics.jsonl", "checkpoints", "model",
        "evaluation.json", "report.html", "record.json",
    }  # fmt: skip
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert result.summary is not None
    assert record["n"] == evaluation["n"] == result.summary.n == 6
    assert record["figures"]["top1_percent"] == result.summary.top1_percent
    assert (record["figures"]["steps"], record["seeds"]) == (9, [0])
    split = json.loads((tmp_path / "run" / "split.json").read_text())
    assert (len(split["train"]), len(split["val"])) == (54, 6)
    assert result.part == "val"


def test_without_holdout_it_trains_on_everything(pictures: Path, tmp_path: Path):
    result = train(config_of(pictures, tmp_path / "run", holdout_percent=None, num_epochs=1))
    assert (result.part, result.summary) == (None, None)
    assert history_of(tmp_path / "run")[-1]["epoch"] == pytest.approx(5 * 12 / 60)
    assert load(tmp_path / "run").predict(pictures / "bird" / "000.png", k=1)
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert (record["n"], record["figures"]["top1_percent"], record["figures"]["steps"]) == (0, None, 5)
    assert not (tmp_path / "run" / "report.html").exists()


def test_a_share_of_the_pictures_is_the_same_share_when_resumed(pictures: Path, tmp_path: Path):
    whole = config_of(pictures, tmp_path / "whole", train_percent=50.0, global_batch_size=6, checkpoint_interval_s=1e-9)
    train(whole)
    split = json.loads((tmp_path / "whole" / "split.json").read_text())
    assert (len(split["train"]), len(split["val"])) == (27, 6)
    assert history_of(tmp_path / "whole")[-1]["step"] == 2 * 27 // 6
    broken = replace(whole, out=str(tmp_path / "broken"))
    with pytest.raises(RuntimeError, match="pulled the plug"):
        train(broken, progress=stop_after(5, pull_the_plug))
    train(broken, start="resume")
    assert_same_end(tmp_path / "whole", tmp_path / "broken")


def test_a_share_of_divided_pictures_is_the_same_share_when_resumed(tmp_path: Path):
    write_pictures(tmp_path / "data" / "train")
    write_pictures(tmp_path / "data" / "val", per_class=2, seed=1)
    whole = config_of(tmp_path / "data", tmp_path / "whole", train_percent=40.0, checkpoint_interval_s=1e-9)
    train(whole)
    assert not (tmp_path / "whole" / "split.json").exists()
    broken = replace(whole, out=str(tmp_path / "broken"))
    with pytest.raises(RuntimeError, match="pulled the plug"):
        train(broken, progress=stop_after(2, pull_the_plug))
    train(broken, start="resume")
    assert_same_end(tmp_path / "whole", tmp_path / "broken")
    with pytest.raises(DataError, match="not those that"):
        train(replace(broken, train_percent=30.0), start="resume")


@pytest.mark.parametrize(("holdout", "part"), [(10.0, "val"), (None, None)])
def test_an_interrupted_run_does_not_look_at_the_test_part(
    holdout: float | None, part: str | None, pictures: Path, tmp_path: Path
):
    data = tmp_path / "pictures"
    for folder in ("train", "test"):
        shutil.copytree(pictures, data / folder)
    config = config_of(data, tmp_path / "run", holdout_percent=holdout)
    stopped = train(config, progress=stop_after(6, lambda: signal.raise_signal(signal.SIGINT)))
    assert (stopped.was_interrupted, stopped.part) == (True, part)
    assert train(config, start="resume").part == "test"


@pytest.mark.parametrize("part", ["train", "val"])
def test_one_bad_file_stops_where_that_is_asked(part: str, pictures: Path, tmp_path: Path):
    data = shutil.copytree(pictures, tmp_path / "pictures")
    (data / json.loads(_split_of(data, tmp_path))[part][0]).write_bytes(b"not a picture")
    with pytest.raises(BadImageError, match="not a picture of a known kind"):
        train(config_of(data, tmp_path / "run", on_bad_image="stop"))


def test_bad_files_are_counted_and_outlive_an_interruption(pictures: Path, tmp_path: Path):
    data = shutil.copytree(pictures, tmp_path / "pictures")
    split = json.loads(_split_of(data, tmp_path))
    (data / split["train"][0]).write_bytes(b"not a picture")
    (data / split["val"][0]).write_bytes(b"nor this")
    config = config_of(data, tmp_path / "run", checkpoint_interval_s=1e-9)
    with pytest.raises(RuntimeError, match="plug"):
        train(config, progress=stop_after(6, pull_the_plug))
    newest, _ = checkpoint.find_newest(tmp_path / "run")
    assert newest is not None
    assert set(json.loads((newest / "state.json").read_text())["bad_images"]) == {split["train"][0], split["val"][0]}
    assert train(config, start="resume").num_bad_images == 2
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert set(evaluation["bad_images"]) == {split["train"][0], split["val"][0]}
    assert evaluation["n"] == 5


def _split_of(data: Path, tmp_path: Path) -> str:
    train(config_of(data, tmp_path / "first", num_epochs=0.2))
    return (tmp_path / "first" / "split.json").read_text()


def test_other_number_of_classes_is_refused(pictures: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="has 3 classes, the model 7"):
        train(config_of(pictures, tmp_path / "run", model=replace(MODEL, num_classes=7)))
    assert not (tmp_path / "run").exists(), "a run that cannot start leaves nothing in the way of the next try"


@pytest.mark.parametrize(("batch", "micro"), [(11, None), (12, 3)])
def test_mixing_needs_pairs(batch: int, micro: int | None, pictures: Path, tmp_path: Path):
    config = config_of(pictures, tmp_path / "run", augment=AUGMENT, global_batch_size=batch, microbatch_size=micro)
    with pytest.raises(ConfigError, match="Mixing takes pictures in pairs"):
        train(config)


@pytest.mark.skipif(not fashion_mnist.SYSTEM_FOLDER.is_dir(), reason="Fashion-MNIST is not installed")
def test_a_data_set_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = fashion_mnist.images
    monkeypatch.setattr(fashion_mnist, "images", lambda folder, part: whole(folder, part, np.arange(200)))
    model = replace(MODEL, num_classes=10, image_size=(28, 28))
    preprocessing = PreprocessingConfig(image_size=(28, 28), fit="resize")
    config = config_of("fashion-mnist", tmp_path / "run", model=model, preprocessing=preprocessing, num_epochs=0.2)
    result = train(config)
    assert result.part == "test"
    assert result.summary is not None
    assert result.summary.n == 200
    assert result.classifier.labels == fashion_mnist.CLASS_NAMES
