"""`coatnet plan`: the tape against what autograd saves, the peak against what a process takes, and the answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from coatnet import cli
from coatnet.config import ModelConfig, OptimizerConfig
from coatnet.errors import ConfigError
from coatnet.layout import count
from coatnet.model.network import CoAtNet
from coatnet.plan.memory import PARTS, Setting, _Walk, peak_bytes
from coatnet.plan.tape import mixing_share, record
from coatnet.training.optimizer import make_optimizers
from coatnet.zoo import ZOO

TOOL = Path(__file__).parent.parent / "tools" / "measure_plan.py"
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
SMALL = ModelConfig(depths=(2, 2, 1, 2, 2), widths=(32, 32, 64, 96, 128), num_classes=10, image_size=(96, 64))
linux = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the system does not tell peaks of memory"
)


@pytest.mark.parametrize("name", ZOO)
def test_the_tape_has_the_networks_parameters(name: str):
    config = ZOO[name].config
    tapes = record(config, "bf16", "cuda")
    assert sum(op.params for tape in tapes for op in tape.ops) == count(config).num_params
    for tape in tapes:
        assert sum(op.params for op in tape.ops) == tape.num_params, tape.name


def bytes_saved(config: ModelConfig, batch: int, precision: str) -> int:
    """Return what autograd keeps of a forward pass, parameters excepted, in bytes."""
    network = CoAtNet(config).to(memory_format=torch.channels_last).train()  # pyright: ignore[reportCallIssue]
    own = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    images = torch.randn(batch, 3, *config.image_size).to(memory_format=torch.channels_last)
    saved: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = network(images)
        F.cross_entropy(logits.float(), torch.zeros(batch, dtype=torch.long)).backward()
    return sum(tensor.untyped_storage().nbytes() for address, tensor in saved.items() if address not in own)


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"stride_in": "depthwise", "relative_attention": "post"}, {"stochastic_depth_rate": 0.3, "head": "plain"}],
    ids=["as it is", "stride in depthwise, post", "stochastic depth, plain head"],
)
def test_autograd_saves_what_the_tape_says(precision: Any, changes: dict[str, Any]):
    config, batch = replace(SMALL, **changes), 3
    tapes = record(config, precision, "cpu")
    planned = 0
    for tape in tapes:
        names = {name for op in tape.ops for name in op.saves}
        planned += batch * sum(tape.maps[name] for name in names)
        planned += sum(batch * op.keeps + tape.copied(op) for op in tape.ops)
    met = bytes_saved(config, batch, precision)
    assert planned == pytest.approx(met, rel=0.005), f"planned {planned:,} bytes, autograd saved {met:,}"


@pytest.mark.parametrize("sharding", ["none", "ddp", "fsdp"])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_at_the_end_nothing_is_left_but_gradients(sharding: Any, checkpointed: bool, device: Any):
    tapes = record(replace(SMALL, stochastic_depth_rate=0.1), "bf16", device)
    setting = Setting(sharding=sharding, num_ranks=4, checkpointed=checkpointed)
    walk = _Walk(8, setting)
    walk.begin(tapes)
    walk.forward_and_back(tapes)
    left = {part: size for part, size in walk.now.items() if abs(size) > 1}
    num_params, shares = sum(tape.num_params for tape in tapes), 4 if sharding == "fsdp" else 1
    root = 8 * sum(tape.num_params for tape in tapes if not tape.is_block)
    want = {"parameters": 4 * num_params / shares, "gradients": 4 * num_params / shares}
    want |= {"optimizer": 8 * num_params / shares, "activations": 8 * tapes[0].maps["x"]}
    want |= {"gathered": root} if sharding == "fsdp" else {}
    assert left == pytest.approx(want, abs=1)


def test_ranks_share_what_fsdp_shards():
    tapes = record(ZOO["coatnet_5"].config, "bf16", "cuda")
    alone, shared = (peak_bytes(tapes, 4, Setting(sharding=sharding, num_ranks=16)) for sharding in ("ddp", "fsdp"))
    for part in ("parameters", "optimizer"):
        assert shared[part] == pytest.approx(alone[part] / 16, abs=1), part
    assert sum(shared.values()) < sum(alone.values())
    assert set(shared) == set(PARTS)


def test_checkpointing_holds_less_and_more_pictures_more():
    tapes = record(ZOO["coatnet_2"].config, "bf16", "cuda")
    totals = [
        sum(peak_bytes(tapes, n, Setting(checkpointed=twice)).values()) for twice in (True, False) for n in (8, 16)
    ]
    assert totals == sorted(totals), totals


def test_muon_keeps_as_much_as_is_planned():
    config = ZOO["coatnet_pico"].config
    network = CoAtNet(config)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizers = make_optimizers(network, OptimizerConfig(method="muon"))
    for optimizer in optimizers:
        optimizer.step()
    held = sum(
        value.nbytes for optimizer in optimizers for state in optimizer.state.values()
        for value in state.values() if value.dim()
    )  # fmt: skip
    planned = (8 - 4 * mixing_share(record(config, "fp32", "cpu"))) * count(config).num_params
    assert planned == pytest.approx(held, rel=0.01)


def measured_mib(case: dict[str, Any]) -> float:
    """Return the peak of a process of its own that trains, as the tool measures it."""
    command = [sys.executable, str(TOOL), "--case", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **MALLOC}, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@linux
def test_the_peak_is_what_a_process_takes():
    case = {"model": "coatnet_tiny", "image_size": 64, "batch": 16, "precision": "fp32", "checkpointed": False}
    measured = measured_mib({**case, "threads": 1})
    tapes = record(replace(ZOO["coatnet_tiny"].config, image_size=(64, 64)), "fp32", "cpu")
    planned = sum(peak_bytes(tapes, 16, Setting()).values()) / 2**20
    assert planned == pytest.approx(measured, rel=0.1), f"planned {planned:.0f} MiB, measured {measured:.0f}"


@linux
@pytest.mark.slow
def test_the_peaks_of_three_networks_at_two_sizes(tmp_path: Path):
    """In both precisions, with and without checkpointing: 24 processes, some 20 minutes."""
    command = [sys.executable, str(TOOL), "--out", str(tmp_path / "record.json"), "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "record.json").read_text())["figures"]["rows"]
    assert len(rows) == 24
    far = [row for row in rows if abs(row["error_percent"]) > 10]
    assert not far, far


class TestCommand:
    def say(self, capsys: pytest.CaptureFixture[str], words: str) -> dict[str, Any]:
        assert cli.run(["plan", *words.split(), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    def test_it_answers_in_a_second(self):
        start = time.perf_counter()
        words = ["plan", "coatnet_7", "--recipe", "imagenet_21k", "--gpus", "256"]
        done = subprocess.run([sys.executable, "-m", "coatnet", *words], capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - start
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("coatnet_7 at 224 px on 256 GPUs of 80 GiB: take "), done.stdout
        assert "Assumed, not measured" in done.stdout
        assert seconds < 5, f"{seconds:.1f} s"  # one where the machine does nothing else

    def test_the_recipes_facts_are_used(self, capsys: pytest.CaptureFixture[str]):
        found = self.say(capsys, "coatnet_4 --recipe imagenet_21k --gpus 64")
        assert (found["num_images"], found["num_epochs"], found["global_batch_size"]) == (12_700_000, 90, 4096)
        assert found["num_classes"] == 21_841
        assert [form["name"] for form in found["forms"]] == [
            "DDP", "DDP + checkpointing", "FSDP", "FSDP + checkpointing",
        ]  # fmt: skip
        for form in found["forms"]:
            assert form["total_bytes"] == sum(form["bytes"].values())
            assert form["fits"] == (form["total_bytes"] <= 0.9 * 80 * 2**30)
        assert found["best"] in [form["name"] for form in found["forms"] if form["fits"]]

    def test_time_is_operations_over_speed(self, capsys: pytest.CaptureFixture[str]):
        words = "coatnet_0 --pictures 1000000 --batch 1000 --gpus 4 --gpu-tflops 100 --utilisation 0.5"
        plain, again = self.say(capsys, words)["forms"][:2]
        flops = 6e9 * 1000 * count(ZOO["coatnet_0"].config).gmacs
        assert plain["flops_a_step"] == pytest.approx(flops)
        assert plain["num_steps"] == 300_000
        assert plain["gpu_hours"] == pytest.approx(300_000 * flops / 50e12 / 3600)
        assert plain["days"] == pytest.approx(plain["gpu_hours"] / 4 / 24)
        assert 1.25 < again["days"] / plain["days"] < 4 / 3, "blocks are computed forward twice, stem and head are not"

    def test_a_gpu_alone_shares_nothing(self, capsys: pytest.CaptureFixture[str]):
        found = self.say(capsys, "coatnet_0 --gpus 1")
        assert [form["name"] for form in found["forms"]] == ["plain training", "plain training + checkpointing"]

    def test_the_largest_microbatch_just_fits(self, capsys: pytest.CaptureFixture[str]):
        words = "coatnet_3 --recipe imagenet_21k --gpu-memory 40"
        form = self.say(capsys, words)["forms"][0]
        assert form["fits"]
        assert form["microbatch_size"] < 512
        more = self.say(capsys, f"{words} --microbatch-size {form['microbatch_size'] + 1}")["forms"][0]
        assert not more["fits"], "one more does not fit"

    def test_averages_are_counted(self, capsys: pytest.CaptureFixture[str]):
        found = self.say(capsys, "coatnet_1 --recipe imagenet_1k_finetune --image-size 384")
        assert found["forms"][0]["bytes"]["average"] == 4 * found["num_params"]

    def test_what_fits_nowhere_is_said(self, capsys: pytest.CaptureFixture[str]):
        found = self.say(capsys, "coatnet_7 --image-size 512 --gpu-memory 4")
        assert found["best"] is None
        assert "does not fit on 8 GPUs of 4 GiB" in found["answer"]
        assert "Give more or larger GPUs" in found["answer"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("coatnet_9", "There is no model 'coatnet_9'"),
        ("coatnet_0 --recipe imagenet", "There is no recipe 'imagenet'. Did you mean 'imagenet_1k'?"),
        ("coatnet_0 --recipe small_scratch", "Say how many they are with --pictures"),
        ("coatnet_0 --gpus 3", "A batch of 4096 has no equal shares for 3 GPUs"),
        ("coatnet_0 --gpus 0", "--gpus is 0. Give a whole number of 1 or more"),
        ("coatnet_0 --microbatch-size 1024", "a GPU's share of an update is 512"),
        ("coatnet_0 --gpu-memory -1", "--gpu-memory is -1. Give a number above 0"),
        ("coatnet_0 --gpu-tflops nan", "--gpu-tflops is nan"),
        ("coatnet_0 --utilisation 30", "Give a share above 0, at most 1"),
        ("coatnet_0 --image-size 0", "cannot be read"),
    ],
)
def test_bad_requests(words: str, said: str, capsys: pytest.CaptureFixture[str]):
    assert cli.run(["plan", *words.split()]) == 2
    assert said in capsys.readouterr().err


def test_networks_that_are_not_planned_are_named():
    with pytest.raises(ConfigError, match="window attention"):
        record(replace(SMALL, attention="window"), "bf16", "cuda")
    with pytest.raises(ConfigError, match="blocks 'listing', which cannot be planned"):
        record(replace(SMALL, blocks="listing", head="plain", head_dim=32), "bf16", "cuda")
