"""The fast form against the readable network: equal answers, errors no larger than those of its precision."""

from __future__ import annotations

import copy
import logging
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import coatnet
from coatnet import native
from coatnet.config import Precision
from coatnet.errors import ConfigError
from coatnet.fast import engines, plan
from coatnet.fast.folding import fold
from coatnet.fast.plan import images_at_once, why_not
from coatnet.layout import unroll
from coatnet.model.network import CoAtNet
from coatnet.zoo import ZOO
from model.networks import KINDS, config_of, images, network

SIDES = st.integers(1, 70)
NETWORKS = {kind: network(config_of(kind)) for kind in KINDS}
FAST = {kind: model for kind, model in NETWORKS.items() if why_not(model.config) is None}
needs_kernels = pytest.mark.skipif(native.missing("int8") is not None, reason=f"{native.missing('int8')}")


@torch.no_grad()
def truth(model: CoAtNet, x: Tensor) -> Tensor:
    return copy.deepcopy(model).double()(x.double())


@torch.no_grad()
def plain(model: CoAtNet, x: Tensor, precision: str) -> Tensor:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    return copy.deepcopy(model).to(dtype)(x.to(dtype)).double()


def rms(error: Tensor) -> float:
    return error.square().mean().sqrt().item()


def test_kernels_are_here():
    """Where the kernels were built they are used; where they were not, the skip says why."""
    if native.missing("fp32") is not None:
        pytest.skip(f"no kernels: {native.missing('fp32')}")
    assert coatnet.optimize(NETWORKS["CCTT"]).engine == "native"


@pytest.mark.parametrize("kind", KINDS)
def test_folded_network_has_no_batch_norm_and_the_same_answers(kind: str):
    model, x = NETWORKS[kind], images(3, (33, 47))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    folded = fold(model)
    left = [name for name, module in folded.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert not left, f"{left} are left"
    error, own = rms(folded(x) - truth(model, x)), rms(plain(model, x, "fp32") - truth(model, x))
    assert error <= 1.5 * own + 1e-7, f"folded errs by {error:.1e}, plain by {own:.1e}"
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items()), "the network changed"


@needs_kernels
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", FAST)
def test_errs_no_more_than_the_plain_network(kind: str, precision: str):
    model, x = FAST[kind], images(16, (61, 83))
    fast = coatnet.optimize(model, precision=precision)
    assert fast.engine == "native", fast.notes
    want = truth(model, x)
    error, own = rms(fast(x) - want), rms(plain(model, x, precision) - want)
    assert error <= 1.5 * own + 1e-7, f"{kind} {precision}: fast errs by {error:.1e}, plain by {own:.1e}"


@needs_kernels
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "name", ["coatnet_0", *(pytest.param(f"coatnet_{n}", marks=pytest.mark.slow) for n in (1, 2, 3, 4)), "coatnet_nano"]
)
def test_rows_of_the_zoo_err_no_more_than_plain(name: str, precision: str):
    model = network(ZOO[name].config)
    x = images(2, model.config.image_size, model.config.in_channels)
    want = truth(model, x)
    fast = coatnet.optimize(model, precision=precision)
    for met, own, measure in (
        (fast(x) - want, plain(model, x, precision) - want, "rms"),
        ((fast(x) - want).abs().max(), (plain(model, x, precision) - want).abs().max(), "largest"),
    ):
        assert rms(met) <= 1.5 * rms(own), f"{name} {precision}, {measure}: fast {rms(met):.1e}, plain {rms(own):.1e}"


@needs_kernels
def test_gelu_in_a_product_against_float64():
    """One column of weight 1: what comes out is GELU of what goes in, beyond where its pieces end too."""
    x = torch.cat([torch.linspace(-12, 12, 100_001), torch.tensor([1e30, -1e30])])
    weight, out = torch.zeros(32), torch.empty_like(x)
    weight[0] = 1
    zeros = torch.zeros(32)
    fields = {
        "kind": native.KINDS["PRODUCT"], "act": native.ACTS["GELU"], "images": 1, "lines": 1, "cells": len(x),
        "depth": 1, "width": 1, "segments": 1, "source_cell": 4, "out_cell": 4, "source": x.data_ptr(),
        "weight": weight.data_ptr(), "bias": zeros.data_ptr(), "out": out.data_ptr(),
    }  # fmt: skip
    native.run((native.Op * 1)(native.Op(**fields)), 1)
    error = (out.double() - nn.functional.gelu(x.double())).abs()
    assert error[:-2].max() < 3e-7 + 12 * 2**-24, f"{error[:-2].max():.1e} at {x[error[:-2].argmax()]}"
    assert out[-2] == x[-2]
    assert abs(out[-1]) < 3e-7


@needs_kernels
@settings(max_examples=120, deadline=None, derandomize=True)
@given(kind=st.sampled_from(list(FAST)), height=SIDES, width=SIDES, batch=st.integers(0, 5))
@torch.no_grad()
def test_any_size_and_batch(kind: str, height: int, width: int, batch: int):
    x = images(batch, (height, width))
    found, want = NATIVE[kind](x), FAST[kind](x)
    assert found.shape == want.shape
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, want, rtol=2e-4, atol=2e-4)


NATIVE = {kind: coatnet.optimize(model) for kind, model in FAST.items()} if native.missing("fp32") is None else {}


CONFIGS = {
    **{name: ZOO[name].config for name in ("coatnet_0", "coatnet_2", "coatnet_7", "coatnet_pico")},
    "depthwise stride": replace(ZOO["coatnet_0"].config, stride_in="depthwise"),
    "empty stages": config_of("vit_rel", depths=(3,), widths=(192,), patch_size=16),
}


@pytest.mark.parametrize("precision", get_args(Precision))
@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=30, deadline=None, derandomize=True)
@given(height=st.integers(1, 600), width=st.integers(1, 600))
def test_stages_take_more_images_as_their_maps_shrink(name: str, precision: Any, height: int, width: int):
    config = replace(CONFIGS[name], image_size=(height, width))
    at_once = images_at_once(config, precision)
    assert len(at_once) == 5
    assert all(after % before == 0 for before, after in pairwise(at_once)), f"groups do not share out: {at_once}"
    smallest = min(block.out_dim * math.prod(block.grid) for block in unroll(config))
    assert 1 <= at_once[-1] <= max(1, plan.AT_ONCE_BYTES // smallest), f"{at_once} of at least {smallest} B each"


@needs_kernels
@pytest.mark.parametrize("precision", get_args(Precision))
@pytest.mark.parametrize("kind", FAST)
def test_groups_of_images_change_nothing(kind: str, precision: Any, monkeypatch: pytest.MonkeyPatch):
    """Where maps are large, the first stages take a few images and the later ones more; the last group is smaller."""
    model, x = FAST[kind], images(13, (64, 61))
    config = replace(model.config, image_size=(64, 61))
    all_at_once = images_at_once(config, precision)[0]
    assert all_at_once >= len(x), "these images are in groups already"
    want = coatnet.optimize(model, precision=precision, calibration=x)(x)
    for most in (1, 2, 3):
        monkeypatch.setattr(plan, "AT_ONCE_BYTES", int(plan.AT_ONCE_BYTES * (most + 0.5) / all_at_once))
        groups = images_at_once(config, precision)
        assert groups[0] == most
        found = coatnet.optimize(model, precision=precision, calibration=x)(x)
        assert torch.equal(found, want), f"groups of {groups}: {(found - want).abs().max():.1e} off"
        monkeypatch.undo()


@needs_kernels
@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_answers_do_not_depend_on_layout_batch_or_order(precision: str):
    fast = coatnet.optimize(NETWORKS["CCTT"], precision=precision, calibration=images(8))
    x = images(7, (64, 64))
    want = fast(x)
    assert torch.equal(fast(x.to(memory_format=torch.channels_last)), want)
    assert torch.equal(fast(x.flip(3).flip(3).transpose(2, 3).contiguous().transpose(2, 3)), want)
    assert torch.equal(fast(images(3, (90, 31))), fast(images(3, (90, 31)))), "a call between changed the answer"
    assert torch.equal(fast(x[3:4]), want[3:4]), "a picture's answer depends on those beside it"
    assert torch.equal(fast(x), want)


@needs_kernels
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_answers_do_not_depend_on_threads(threads: int):
    fast, x = coatnet.optimize(NETWORKS["CCTT"]), images(3, (64, 64))
    before = torch.get_num_threads()
    want = fast(x)
    try:
        torch.set_num_threads(threads)
        torch.testing.assert_close(fast(x), want, rtol=1e-5, atol=1e-5)
    finally:
        torch.set_num_threads(before)


@needs_kernels
def test_int8_keeps_the_order_of_logits():
    model = network(ZOO["coatnet_nano"].config)
    x = images(32, model.config.image_size, model.config.in_channels)
    fast = coatnet.optimize(model, precision="int8", calibration=[x[:16], x[16:]])
    want = model(x).detach()
    error = rms(fast(x) - want) / want.std().item()
    assert fast.engine == "native"
    assert error < 0.15, f"int8 errs by {error:.1%} of the logits' deviation, on random weights"


def test_network_in_training_mode_and_with_gradients_is_left_alone():
    model = network(config_of(), training=True)
    x = images(2, (32, 48))
    found = coatnet.optimize(model)(x.requires_grad_())
    assert model.training
    assert not found.requires_grad
    torch.testing.assert_close(found, copy.deepcopy(model).eval()(x).detach(), rtol=1e-4, atol=1e-4)


def test_answers_are_tensors_like_any_other():
    """They may be changed in place and learnt from."""
    answers = coatnet.optimize(NETWORKS["CCTT"])(images(2, (32, 32)))
    answers += 1
    probe = nn.Linear(answers.shape[1], 2)
    probe(answers).sum().backward()
    assert probe.weight.grad is not None


@needs_kernels
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_images_whose_channels_lie_gigabytes_apart(precision: Any):
    """A view into a block (3, B, H, W): its memory is never touched but for one image's."""
    far = torch.empty(3, 5400, 224, 224).permute(1, 0, 2, 3)[:1]
    far.copy_(torch.randn(1, 3, 224, 224))
    fast = coatnet.optimize(NETWORKS["CCTT"], precision=precision)
    assert far.stride(1) * 4 * 2 > 2**31
    torch.testing.assert_close(fast(far), fast(far.contiguous()), rtol=0, atol=0)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in FAST])
def test_falls_back_and_says_so(kind: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(engines, "_has_compiler", lambda: False)
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with caplog.at_level(logging.WARNING, "coatnet"):
        fast = coatnet.optimize(NETWORKS[kind])
    assert fast.engine == "plain"
    (note,) = caplog.messages
    assert "no kernels of our own, since" in note
    assert "pip install" in note
    x = images(3, (40, 50))
    torch.testing.assert_close(fast(x), NETWORKS[kind](x).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"precision": "fp16"}, "precision is 'fp16'. It must be one of fp32, bf16, int8"),
        ({"precision": "int8"}, "int8 needs calibration images"),
        ({"precision": "int8", "calibration": []}, "calibration holds no image"),
        ({"precision": "int8", "calibration": torch.zeros(2, 1, 8, 8)}, "Give (B, 3, H, W)"),
    ],
)
def test_bad_requests(asked: dict[str, Any], said: str):
    with pytest.raises(ConfigError) as error:
        coatnet.optimize(NETWORKS["CCTT"], **asked)
    assert said in str(error.value)


@pytest.mark.parametrize(
    "bad", [torch.zeros(3, 8, 8), torch.zeros(1, 1, 8, 8), torch.zeros(1, 3, 8, 8).byte()], ids=str
)
def test_bad_images(bad: Tensor):
    with pytest.raises(ConfigError):
        coatnet.optimize(NETWORKS["CCTT"])(bad)


def test_other_models_are_refused():
    with pytest.raises(ConfigError, match="A Linear cannot be optimized"):
        coatnet.optimize(nn.Linear(2, 2))


@pytest.mark.parametrize("engine", ["openvino", "compiled"])
@pytest.mark.slow
def test_other_engines_agree(engine: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "missing", lambda _precision: "this test says so")
    if engine == "openvino":
        pytest.importorskip("openvino")
    else:
        monkeypatch.setitem(__import__("sys").modules, "coatnet.fast.openvino_form", None)
    model, x = network(replace(config_of(), image_size=(32, 32))), images(3, (32, 32))
    fast = coatnet.optimize(model)
    assert fast.engine == engine, fast.notes
    torch.testing.assert_close(fast(x), model(x).detach(), rtol=1e-4, atol=1e-4)
    if engine == "openvino":
        kept = list(tmp_path.rglob("model.xml"))
        assert len(kept) == 1
        times = kept[0].stat().st_mtime_ns
        torch.testing.assert_close(coatnet.optimize(model)(x), fast(x))
        assert kept[0].stat().st_mtime_ns == times, "the second process converts nothing"


@pytest.mark.slow
def test_a_cache_that_cannot_be_is_said_and_done_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    pytest.importorskip("openvino")
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(native, "missing", lambda _precision: "this test says so")
    model, x = network(replace(config_of(), image_size=(32, 32))), images(3, (32, 32))
    fast = coatnet.optimize(model)
    assert fast.engine == "openvino"
    assert "what is compiled is not kept for the next process" in fast.notes[-1]
    torch.testing.assert_close(fast(x), model(x).detach(), rtol=1e-4, atol=1e-4)
