"""Two ranks end where one does: real processes under torchrun, gloo, on the CPU."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from coatnet.config import OptimizerConfig, TrainConfig
from coatnet.data.sources import open_data
from coatnet.errors import ConfigError
from coatnet.ranks import Ranks
from coatnet.training import loop
from coatnet.training.loop import train
from training.process import finish
from training.tiny import AUGMENT, NO_BATCH_NORM, config_of, history_of, write_pictures

TESTS = Path(__file__).parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*TORCHRUN, *arguments], cwd=TESTS, env=environment, capture_output=True, text=True, timeout=500
    )


def on_two_ranks(config: TrainConfig, tmp_path: Path) -> dict:
    """Train on two ranks; return what the second one noted."""
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    done = torchrun(
        str(TESTS / "distributed" / "one_rank.py"), str(tmp_path / "config.json"), str(tmp_path / "noted.json")
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((tmp_path / "noted.json").read_text())


@pytest.mark.parametrize("method", ["adamw", "muon"])
def test_two_ranks_end_where_one_does(method: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The same 12 pictures an update, with mixing, stochastic depth, microbatches, averaging, a bad file on each rank.

    LayerNorm stands in for BatchNorm, whose statistics are each rank's own. What follows a clock is on as well: were it
    each rank's own, the ranks would part and wait for each other for ever.
    """
    data = write_pictures(tmp_path / "pictures")
    split = open_data(data).split
    assert split is not None
    bad = {split["train"][7], split["train"][40]}
    for name in bad:
        (data / name).write_bytes(b"not a picture")
    config = config_of(
        data,
        tmp_path / "together",
        model=replace(NO_BATCH_NORM, stochastic_depth_rate=0.3),
        augment=AUGMENT,
        optimizer=OptimizerConfig(method=method, peak_lr=1e-3, warmup_steps=2),
        microbatch_size=2,
        patience_epochs=50,
        max_time_s=1e9,
        checkpoint_interval_s=0.05,
    )
    noted = on_two_ranks(config, tmp_path)
    monkeypatch.setattr(loop, "finish", lambda run: run)
    alone = tmp_path / "alone"
    train(replace(config, out=str(alone), microbatch_size=None))

    for mine, theirs in zip(history_of(tmp_path / "together"), history_of(alone), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    found, want = (load_file(run / "model" / "model.safetensors") for run in (tmp_path / "together", alone))
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        mine, theirs = (_that_matter(name, values) for values in (found[name], tensor))
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")

    assert noted["changes"] == [], "only the first rank writes"
    assert noted["bad"] == 2, "and every rank's bad files are counted"
    evaluation = json.loads((tmp_path / "together" / "evaluation.json").read_text())
    assert set(evaluation["bad_images"]) == bad


def _that_matter(name: str, values: torch.Tensor) -> torch.Tensor:
    """Leave out biases that softmax or a norm gives no gradient: AdamW makes steps of what rounding leaves."""
    if name in ("s0.0.bias", "s0.3.bias"):  # BatchNorm comes after both
        return values[:0]
    if not name.endswith("qkv.bias"):
        return values
    query, _key, value = values.chunk(3)
    return torch.cat([query, value])


def ranks_end_close(found: Path, want: Path) -> None:
    for mine, theirs in zip(history_of(found), history_of(want), strict=True):
        assert mine == pytest.approx(theirs, rel=2e-4, abs=1e-5)
    mine, theirs = (load_file(run / "model" / "model.safetensors") for run in (found, want))
    for name, tensor in theirs.items():
        pair = (_that_matter(name, values) for values in (mine[name], tensor))
        torch.testing.assert_close(*pair, rtol=2e-3, atol=2e-4, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("workers", [0, pytest.param(8, marks=pytest.mark.slow)])
def test_a_run_moves_between_world_sizes(workers: int, tmp_path: Path):
    """With statistics of all ranks, one rank, then two, then four, go through the same updates as one alone."""
    data = write_pictures(tmp_path / "pictures")
    flags = [
        "--model", "coatnet_pico", "--batch-size", "16", "--epochs", "4", "--device", "cpu", "--precision", "fp32",
        "--sync-batch-norm", "--mixup", "0.8", "--stochastic-depth", "0.2", "--checkpoint-every", "0.001s",
        "--workers", str(workers), "--seed", "3", "--keep-last", "100",
    ]  # fmt: skip
    words = ["-m", "coatnet", "train", str(data)]
    alone = finish([sys.executable, *words, "--out", str(tmp_path / "alone"), *flags])
    assert alone.returncode == 0, alone.stderr
    run = tmp_path / "run"
    shutil.copytree(tmp_path / "alone", run)
    for size, step in ((2, 4), (4, 9)):  # go back to an earlier moment of the run and on from there with more ranks
        for folder in (run / "checkpoints").iterdir():
            if int(folder.name[5:]) > step:
                shutil.rmtree(folder)
        torchrun_of = [*TORCHRUN[:-1], str(size)]
        done = finish([*torchrun_of, *words, "--out", str(run), *flags, "--resume"])
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"resumed from step-{step:08d}" in done.stdout
    ranks_end_close(run, tmp_path / "alone")


def test_the_command_runs_under_torchrun(tmp_path: Path):
    """One JSON object on standard output, whatever the number of ranks, and one run folder."""
    data = write_pictures(tmp_path / "pictures", per_class=8)
    done = torchrun(
        "-m", "coatnet", "train", str(data), "--out", str(tmp_path / "run"), "--model", "coatnet_pico", "--epochs", "1",
        "--batch-size", "8", "--json", "--device", "cpu",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["n"] == 3
    assert done.stderr.count("recipe tiny_pictures: ") == 1, "one rank speaks"
    assert (tmp_path / "run" / "report.html").is_file()


def test_shares_must_be_equal(pictures: Path, tmp_path: Path):
    config = config_of(pictures, tmp_path / "run", global_batch_size=13)
    ranks = Ranks(0, 2, torch.device("cpu"))
    with pytest.raises(ConfigError, match="A batch of 13 has no equal shares for 2 ranks"):
        loop._check_fits(config, open_data(pictures), ranks)
    with pytest.raises(ConfigError, match="a rank's share is 7"):
        loop._check_fits(replace(config, global_batch_size=14, augment=AUGMENT), open_data(pictures), ranks)
