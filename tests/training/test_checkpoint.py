"""Checkpoints: whole or passed over, bit for bit what was saved, and a few of them only."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from coatnet.config import OptimizerConfig
from coatnet.errors import ModelFileError
from coatnet.training import checkpoint
from coatnet.training.ema import Ema
from coatnet.training.optimizer import make_optimizers
from coatnet.training.start import build
from model.networks import assert_equal
from training.tiny import MODEL, SIZE

FILES = ("network.safetensors", "optimizer.safetensors", "ema.safetensors", "state.json", "manifest.json")


def state_at(step: int, *, seed: int = 0, method: Any = "adamw") -> checkpoint.State:
    """Return a state after so many updates on made-up pictures."""
    network = build(MODEL, seed).to(memory_format=torch.channels_last)
    state = checkpoint.State(network, make_optimizers(network, OptimizerConfig(method=method)), Ema(network, 0.9))
    for _ in range(step):
        update(state)
    return state


def update(state: checkpoint.State) -> None:
    images = torch.randn(4, 3, *SIZE, generator=torch.Generator().manual_seed(state.step))
    state.network.train()
    state.network(images).square().mean().backward()
    for optimizer in state.optimizers:
        optimizer.step()
        optimizer.zero_grad()
    state.step += 1
    assert state.ema is not None
    state.ema.update(state.network, state.step)


def tensors_of(state: checkpoint.State) -> dict[str, Tensor]:
    assert state.ema is not None
    tensors = {f"network {name}": tensor for name, tensor in state.network.state_dict().items()}
    tensors |= {f"average {name}": tensor for name, tensor in state.ema.network.state_dict().items()}
    names = {id(parameter): name for name, parameter in state.network.named_parameters()}
    for optimizer in state.optimizers:
        for parameter, kinds in optimizer.state.items():
            tensors |= {f"optimizer {names[id(parameter)]} {kind}": tensor for kind, tensor in kinds.items()}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@pytest.mark.parametrize("method", ["adamw", "muon"])
def test_round_trip_is_bit_equal_and_goes_on_alike(method: str, tmp_path: Path):
    state = state_at(2, method=method)
    state.history = [{"epoch": 0.5, "train_loss": 0.1 + 0.2}]
    state.elapsed_s, state.loss_sum, state.num_losses = 1.5, 1 / 3, 7
    state.best_top1_percent, state.best_epoch, state.warmup_share = 200 / 3, 0.25, 0.125
    state.bad_images = {"bird/x.png": "not a picture"}
    folder = checkpoint.save(tmp_path, state)
    assert folder.name == "step-00000002"

    found = state_at(0, seed=1, method=method)
    assert checkpoint.find_newest(tmp_path) == (folder, [])
    checkpoint.load(folder, found)
    assert_equal(tensors_of(found), tensors_of(state))
    assert found.numbers() == state.numbers()
    assert found.numbers()["history"] == state.history
    for one in (state, found):
        update(one)
    assert_equal(tensors_of(found), tensors_of(state))


def test_a_checkpoint_of_another_network_is_told_in_words(tmp_path: Path):
    folder = checkpoint.save(tmp_path, state_at(1))
    other = build(replace(MODEL, num_classes=5), 0)
    state = checkpoint.State(other, make_optimizers(other, OptimizerConfig()), Ema(other, 0.9))
    with pytest.raises(ModelFileError, match=r"classifier\.weight: file \(3, 32\), model \(5, 32\)"):
        checkpoint.load(folder, state)
    numbers = json.loads((folder / "state.json").read_text())
    del numbers["rate"]
    (folder / "state.json").write_text(json.dumps(numbers))
    with pytest.raises(ModelFileError, match="has no rate: it is of another version"):
        checkpoint.load(folder, state_at(0))


def test_every_number_of_the_state_is_saved():
    """A field that is added to State and forgotten here would make a resumed run another one."""
    fields = set(vars(state_at(0))) - {"network", "optimizers", "ema"}
    assert set(state_at(0).numbers()) == fields


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_falls_back_to_the_one_before(name: str, tmp_path: Path):
    state = state_at(1)
    good = checkpoint.save(tmp_path, state)
    update(state)
    damaged = checkpoint.save(tmp_path, state)
    content = bytearray((damaged / name).read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / name).write_bytes(content)
    found, notes = checkpoint.find_newest(tmp_path)
    assert found == good
    assert len(notes) == 1
    assert str(damaged) in notes[0]
    assert "damaged" in notes[0] or "cannot be read" in notes[0] or "missing" in notes[0]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_falls_back_too(name: str, tmp_path: Path):
    state = state_at(1)
    good = checkpoint.save(tmp_path, state)
    update(state)
    (checkpoint.save(tmp_path, state) / name).unlink()
    found, notes = checkpoint.find_newest(tmp_path)
    assert found == good
    assert re.search(rf"{re.escape(name)} is (missing|not there)", notes[0])


def test_none_good_and_none_at_all(tmp_path: Path):
    assert checkpoint.find_newest(tmp_path) == (None, [])
    folder = checkpoint.save(tmp_path, state_at(1))
    (folder / "state.json").write_text("{}")
    found, notes = checkpoint.find_newest(tmp_path)
    assert found is None
    assert len(notes) == 1


def steps_kept(run: Path) -> list[int]:
    return sorted(int(folder.name.removeprefix("step-")) for folder in (run / "checkpoints").iterdir())


def test_the_newest_few_are_kept(tmp_path: Path):
    state = state_at(0)
    for _ in range(4):
        update(state)
        checkpoint.save(tmp_path, state)
    assert checkpoint.Retention().num_last == 2
    assert steps_kept(tmp_path) == [3, 4]


def test_checkpoints_of_a_future_that_was_given_up_go(tmp_path: Path):
    """After a fall-back the damaged newest must not outlive the good ones."""
    state = state_at(0)
    for step in (10, 20):
        state.step = step
        checkpoint.save(tmp_path, state)
    (tmp_path / "checkpoints" / "step-00000020" / "ema.safetensors").unlink()
    state.step = 15
    checkpoint.save(tmp_path, state)
    assert steps_kept(tmp_path) == [10, 15]


def test_saving_the_same_step_again_replaces_it(tmp_path: Path):
    state = state_at(1)
    checkpoint.save(tmp_path, state)
    state.elapsed_s = 9.0
    folder = checkpoint.save(tmp_path, state)
    assert steps_kept(tmp_path) == [1]
    checkpoint.load(folder, found := state_at(0))
    assert found.elapsed_s == 9.0


KILLED = """
    import sys, time
    from pathlib import Path
    from coatnet import files
    from coatnet.training import checkpoint
    from training.test_checkpoint import state_at, update

    state = state_at(1)
    checkpoint.save(Path(sys.argv[1]), state)
    update(state)
    files._sync = lambda path: (print("saving", flush=True), time.sleep(600))
    checkpoint.save(Path(sys.argv[1]), state)
"""


def test_a_kill_in_a_save_leaves_the_one_before_whole(tmp_path: Path):
    command = [sys.executable, "-c", textwrap.dedent(KILLED), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as here: two threads give other bits
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1], env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "saving\n"
        process.kill()
    assert process.returncode == -signal.SIGKILL
    half_written = list((tmp_path / "checkpoints").glob(".step-*"))
    assert half_written, "the kill came too late to test anything"
    found, notes = checkpoint.find_newest(tmp_path)
    assert found is not None
    assert (found.name, notes) == ("step-00000001", [])
    checkpoint.load(found, state := state_at(0, seed=1))
    assert_equal(tensors_of(state), tensors_of(state_at(1)))
    update(state)
    checkpoint.save(tmp_path, state)
    assert steps_kept(tmp_path) == [1, 2], "and what was half written is cleared away"
