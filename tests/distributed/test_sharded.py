"""A network divided over ranks: it learns what DDP learns, and its checkpoints fit any number of ranks, bit for bit."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from coatnet import zoo
from coatnet.config import OptimizerConfig, TrainConfig
from coatnet.errors import ConfigError, ModelFileError
from coatnet.files import MANIFEST, write_json
from coatnet.layout import count
from coatnet.model.network import CoAtNet
from coatnet.ranks import Ranks
from coatnet.training import checkpoint, loop, sharded
from coatnet.training.ema import Ema
from coatnet.training.loop import train
from coatnet.training.optimizer import make_optimizers
from coatnet.training.start import build
from model.networks import assert_equal
from training.tiny import AUGMENT, MODEL, NO_BATCH_NORM, config_of, history_of, write_pictures

TESTS = Path(__file__).parents[1]
STOP_AFTER, NUM_STEPS = 4, 6
LARGEST = ["coatnet_6", "coatnet_7"]


def on_ranks(groups: dict[int, list[dict[str, Any]]], folder: Path, *, timeout_s: float = 300) -> None:
    """Have groups of so many ranks do these jobs (sharded_rank.py)."""
    file = folder / "groups.json"
    file.write_text(json.dumps([{"ranks": ranks, "jobs": jobs} for ranks, jobs in groups.items()]))
    command = [sys.executable, str(TESTS / "distributed" / "sharded_rank.py"), str(file)]
    paths = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-5000:]
    assert "Warning" not in done.stderr, done.stderr[-5000:]


def elastic(data: Path, out: Path) -> TrainConfig:
    """Return a run whose every update is the same for any number of ranks: no BatchNorm, all draws keyed."""
    return config_of(
        data,
        out,
        model=replace(NO_BATCH_NORM, stochastic_depth_rate=0.3),
        augment=AUGMENT,
        optimizer=OptimizerConfig(peak_lr=1e-3, warmup_steps=2),
        global_batch_size=8,
        num_epochs=NUM_STEPS * 8 / 54,  # of 60 pictures less the tenth held out
        evaluation_interval_epochs=0.5,
        activation_checkpointing=True,
        shard=True,
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Do everything that takes two and four ranks, and return the folder with what came of it.

    elastic/  two ranks, divided, stopped after a few updates; copied, then four ranks go on with it
    divided/  two ranks, divided, to the end; whole/ the same by DDP; then DDP loads what divided/ left
    """
    folder = tmp_path_factory.mktemp("sharded")
    data = write_pictures(folder / "pictures")
    stopped = elastic(data, folder / "elastic")
    divided = config_of(data, folder / "divided", microbatch_size=3, freeze="S0", shard=True)
    whole = replace(divided, out=str(folder / "whole"), shard=False)
    loads = replace(divided, shard=False)
    full = replace(divided, out=str(folder / "full"))
    two: list[dict[str, Any]] = [
        {"do": "train", "config": stopped.to_dict(), "stop_after": STOP_AFTER, "found": f"{folder}/stopped.st"},
        {"do": "train", "config": divided.to_dict(), "found": f"{folder}/divided.st"},
        {"do": "train", "config": whole.to_dict(), "found": f"{folder}/whole.st"},
        {"do": "train", "config": loads.to_dict(), "resumes": True, "found": f"{folder}/loaded_by_ddp.st"},
        {"do": "fail_to_save", "config": full.to_dict(), "found": f"{folder}/full.json"},
        {"do": "divide_on_meta", "names": LARGEST, "found": f"{folder}/largest.json"},
        {"do": "copy", "source": f"{folder}/elastic", "found": f"{folder}/stopped"},
    ]
    four = {"do": "train", "config": stopped.to_dict(), "resumes": True, "found": f"{folder}/resumed.st"}
    on_ranks({2: two, 4: [four | {"found_at_start": f"{folder}/loaded_by_four.st"}]}, folder)
    return folder


def only_checkpoint(run: Path) -> Path:
    found, damage = checkpoint.find_newest(run, keeps_average=True)
    assert damage == []
    assert found is not None
    return found


def assert_close(found: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert found.keys() == want.keys()
    for name, tensor in want.items():
        mine, theirs = (_that_matter(name, values) for values in (found[name], tensor))
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def _that_matter(name: str, values: Tensor) -> Tensor:
    """Leave out what gets no gradient, of whose rounding AdamW makes whole steps.

    Softmax gives none to keys' biases, and a BatchNorm none to a bias before it, which only moves its running mean.
    """
    if name.endswith("qkv.bias") and values.dim():
        query, _key, value = values.chunk(3)
        return torch.cat([query, value])
    if re.search(r"/s\d\.\d\.(norm\.bias|expand_norm\.running_mean)$", name):
        return torch.zeros(())
    return values


def test_two_divided_ranks_end_where_ddp_does(done: Path):
    """BatchNorm and all: each rank sees the same pictures either way. With microbatches, EMA, a frozen stage."""
    assert_close(load_file(done / "divided.st"), load_file(done / "whole.st"))
    for mine, theirs in zip(history_of(done / "divided"), history_of(done / "whole"), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_two_ranks_stopped_and_four_going_on_end_where_one_does(done: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loop, "finish", lambda run: run)
    alone = done / "alone"
    train(replace(elastic(done / "pictures", alone), shard=False))
    assert json.loads((only_checkpoint(done / "elastic") / "state.json").read_text())["step"] == NUM_STEPS
    assert_close(*(load_file(run / "model" / "model.safetensors") for run in (done / "elastic", alone)))
    for mine, theirs in zip(history_of(done / "elastic"), history_of(alone), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(("found", "saved"), [("loaded_by_four", "stopped"), ("loaded_by_ddp", "divided")])
def test_what_two_ranks_saved_others_load_bit_for_bit(found: str, saved: str, done: Path):
    """Weights, statistics, the average and the optimizer's tensors, as rank 0 saw them whole before the save."""
    want = load_file(done / f"{saved}.st")
    assert {name.split("/")[0] for name in want} == {"network", "average", "exp_avg", "exp_avg_sq", "step"}
    assert_equal(load_file(done / f"{found}.st"), want)


@pytest.mark.parametrize(("saved", "model"), [("stopped", NO_BATCH_NORM), ("divided", MODEL)])
def test_and_so_does_one_process_reading_no_pickle(saved: str, model: Any, done: Path):
    state = fresh(model, done, saved)
    with pickles_noted() as unpickled:
        folder = only_checkpoint(done / saved)
        checkpoint.load(folder, state)
    assert unpickled == []
    found = sharded._tensors(checkpoint._networks(state), checkpoint._moments(state))
    assert_equal(found, load_file(done / f"{saved}.st"))
    assert {file.suffix for file in folder.rglob("*") if file.is_file()} == {".safetensors", ".json"}


def fresh(model: Any, done: Path, saved: str) -> checkpoint.State:
    """Return a state of other weights than any that was trained."""
    config = TrainConfig.from_dict(json.loads((done / saved / "config.json").read_text()))
    network = build(replace(model, num_classes=config.model.num_classes), seed=7)
    network.to(memory_format=torch.channels_last)  # pyright: ignore
    if config.freeze:
        network.s0.requires_grad_(False)
    return checkpoint.State(network, make_optimizers(network, config.optimizer), Ema(network, 0.9))


_NOTED: list[list[str]] = []  # an audit hook stays for good, so it looks here whether anyone listens


def _note_pickles(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "pickle.find_class" and _NOTED:
        _NOTED[-1].append(".".join(arguments))


sys.addaudithook(_note_pickles)


@contextmanager
def pickles_noted() -> Iterator[list[str]]:
    _NOTED.append([])
    try:
        yield _NOTED[-1]
    finally:
        _NOTED.pop()


def test_one_process_writes_what_it_read(done: Path, tmp_path: Path):
    """From two ranks to one and back to any: the same format, whoever writes."""
    state = fresh(MODEL, done, "divided")
    ranks = Ranks(0, 1, torch.device("cpu"))
    assert isinstance(state.network, CoAtNet)
    for network in (state.network, state.ema.network if state.ema else state.network):
        ranks.shard(network, [])
    checkpoint.load(only_checkpoint(done / "divided"), state)
    folder = checkpoint.save_shards(tmp_path, state, ranks)
    assert checkpoint.find_newest(tmp_path, keeps_average=True) == (folder, [])
    checkpoint.load(folder, again := fresh(MODEL, done, "divided"))
    found = sharded._tensors(checkpoint._networks(again), checkpoint._moments(again))
    assert_equal(found, load_file(done / "divided.st"))


def test_a_rank_that_cannot_write_stops_no_rank(done: Path):
    """The second rank's writes fail: both ranks say so, nothing half-written is left, the next save is good."""
    found = json.loads((done / "full.json").read_text())
    for rank in found:
        assert rank["error"].startswith("OSError: [Errno 27] File too large"), rank["error"]
        assert (rank["left"], rank["then"]) == ([], [])


@pytest.fixture
def damaged(done: Path, tmp_path: Path) -> Path:
    """Return a run whose one checkpoint may be damaged."""
    return shutil.copytree(done / "stopped", tmp_path / "run")


@pytest.mark.parametrize("rank", [1, 2])
def test_a_flipped_bit_in_a_shard_is_found(rank: int, damaged: Path):
    file = next(only_checkpoint(damaged).glob(f"shards/shard-{rank:05d}-*"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    found, notes = checkpoint.find_newest(damaged)
    assert found is None
    assert file.name in notes[0]
    assert "damaged" in notes[0]


def shards_of(folder: Path, rank: int) -> list[Path]:
    found = sorted(folder.glob(f"shards/shard-{rank:05d}-*"))
    assert found
    return found


def forget(folder: Path, name: str) -> None:
    """Take a file's line out of the manifest."""
    manifest = json.loads((folder / MANIFEST).read_text())
    del manifest["sha256"][name]
    write_json(folder / MANIFEST, manifest)


def test_a_missing_shard_is_found_even_if_the_manifest_forgot_it(damaged: Path):
    folder = only_checkpoint(damaged)
    (file := shards_of(folder, 1)[0]).unlink()
    _, notes = checkpoint.find_newest(damaged)
    assert f"{sharded.SHARDS}/{file.name} is missing" in notes[0]
    forget(folder, f"{sharded.SHARDS}/{file.name}")
    found, notes = checkpoint.find_newest(damaged)
    assert found is None
    assert "are missing from 0 on" in notes[0]


def test_the_last_rows_missing_are_found_before_a_weight_is_used(damaged: Path, done: Path):
    folder = only_checkpoint(damaged)
    for file in shards_of(folder, 2):
        file.unlink()
        forget(folder, f"{sharded.SHARDS}/{file.name}")
    state = fresh(NO_BATCH_NORM, done, "stopped")
    before = {name: tensor.clone() for name, tensor in state.network.state_dict().items()}
    with pytest.raises(ModelFileError, match="is of another network or optimizer"):
        checkpoint.load(folder, state)
    assert_equal(state.network.state_dict(), before)


def test_a_file_that_the_manifest_forgot_is_not_trusted(damaged: Path):
    folder = only_checkpoint(damaged)
    forget(folder, f"{sharded.SHARDS}/{shards_of(folder, 2)[0].name}")
    _, notes = checkpoint.find_newest(damaged)
    assert "does not list" in notes[0]


def test_shards_that_are_no_safetensors_are_a_clean_error(damaged: Path):
    folder = only_checkpoint(damaged)
    shards_of(folder, 1)[0].write_bytes(b"\xff" * 100)
    with pytest.raises(ModelFileError, match="cannot be read"):
        sharded.read(folder, {}, {})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": OptimizerConfig(method="muon")}, "Muon, which needs whole matrices"),
        ({"compile": True}, "shard and compile are both on"),
    ],
)
def test_what_cannot_be_divided_is_said_before_the_run(changes: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(ConfigError, match=message):
        config_of("pictures", tmp_path, shard=True, **changes)


def test_the_largest_networks_divide_without_memory(done: Path):
    """C-6 and C-7 on the meta device: two ranks hold a half each, but for the odd row."""
    found = json.loads((done / "largest.json").read_text())
    for name in LARGEST:
        wanted = count(zoo.find(name).config).num_params
        shares = [rank[name]["mine"] for rank in found]
        assert [rank[name]["whole"] for rank in found] == [wanted, wanted]
        assert sum(shares) == wanted
        assert max(shares) / wanted < 0.501, f"{name}: {shares}"


@pytest.mark.slow
def test_coatnet_5_takes_a_step_on_two_ranks(tmp_path: Path):
    """688 M parameters, fp32, activation checkpointing, AdamW and a second microbatch: real ones, small pictures."""
    data = write_pictures(tmp_path / "pictures", per_class=4)
    config = config_of(
        data,
        tmp_path / "run",
        model=replace(zoo.find("coatnet_5").config, image_size=(32, 32), num_classes=3),
        global_batch_size=8,
        microbatch_size=2,
        activation_checkpointing=True,
        ema_decay=None,
        shard=True,
    )
    job = {"do": "step", "config": config.to_dict(), "found": f"{tmp_path}/found.json"}
    on_ranks({2: [job]}, tmp_path, timeout_s=1800)
    found = json.loads((tmp_path / "found.json").read_text())
    print(found)
    assert found[0]["whole"] == count(config.model).num_params
    assert found[0]["whole"] > 680e6
    assert sum(rank["mine"] for rank in found) == found[0]["whole"]
    assert found[0]["loss"] == found[1]["loss"] == pytest.approx(1.0986, abs=0.5)  # ln 3
    for rank in found:
        assert len(rank["moved"]) == 4
    assert sum(rank["peak_gib"] for rank in found) < 24, f"{[rank['peak_gib'] for rank in found]} GiB"
