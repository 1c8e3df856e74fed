"""AdamW and Muon: who takes which weights, which decay, Muon's equations, and the rate at each moment."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import Optimizer

from coatnet.config import OptimizerConfig
from coatnet.model.network import CoAtNet
from coatnet.training.optimizer import (
    MUON_RATE,
    MUON_RMS,
    Muon,
    learning_rate,
    make_optimizers,
    orthogonalised,
    set_rate,
)
from coatnet.training.start import freeze
from model.networks import KINDS, config_of

METHODS = ("adamw", "muon")


def config(method: Any = "adamw", **changes: Any) -> OptimizerConfig:
    return OptimizerConfig(method=method, **changes)


def held(optimizers: list[Optimizer], *, decaying: bool = False) -> list[int]:
    """Return the ids of the parameters in the optimizers' groups, or in those that decay."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    return [id(p) for group in groups if group["weight_decay"] or not decaying for p in group["params"]]


def names_of(network: nn.Module, ids: list[int]) -> set[str]:
    return {name for name, parameter in network.named_parameters() if id(parameter) in ids}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_decay_and_nothing_else(kind: str, method: str):
    """What has one dimension is a norm or a bias; of the rest only bias tables are no weights."""
    network = CoAtNet(config_of(kind))
    optimizers = make_optimizers(network, config(method))
    want = {name for name, p in network.named_parameters() if p.ndim >= 2 and not name.endswith("table")}
    assert names_of(network, held(optimizers, decaying=True)) == want
    assert sorted(held(optimizers)) == sorted(id(p) for p in network.parameters()), "each parameter once"


def test_muon_takes_the_weights_that_mix_channels():
    network = CoAtNet(config_of())
    adamw, muon = make_optimizers(network, config("muon"))
    assert isinstance(adamw, torch.optim.AdamW)
    assert isinstance(muon, Muon)
    taken = names_of(network, held([muon]))
    assert {name.rsplit(".", 2)[-2] for name in taken if name.startswith("s1")} == {
        "1",  # the shortcut's projection, after its pooling
        "expand",
        "reduce",
        "shrink",
    }
    assert {name.split(".")[0] for name in taken} == {"s0", "s1", "s2", "s3", "s4", "pre_logits"}
    assert not [name for name in taken if "depthwise" in name or "table" in name or name.endswith("bias")]


@pytest.mark.parametrize("method", METHODS)
def test_without_a_gradient_only_decay_moves_weights(method: str):
    network = CoAtNet(config_of())
    optimizers = make_optimizers(network, config(method, weight_decay=0.5))
    set_rate(optimizers, 0.1)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    weights = names_of(network, held(optimizers, decaying=True))
    for name, parameter in network.named_parameters():
        rate = 0.1 * (MUON_RATE if id(parameter) in held(optimizers[1:]) else 1)
        factor = 1 - rate * 0.5 if name in weights else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor, msg=f"{name} should scale by {factor}")


@pytest.mark.parametrize("method", METHODS)
def test_what_is_frozen_is_in_no_group(method: str):
    network = CoAtNet(config_of())
    freeze(network, "S4")
    names = names_of(network, held(make_optimizers(network, config(method))))
    assert {name.split(".")[0] for name in names} == {"norm", "pre_logits", "classifier"}


def test_settings_reach_the_optimizers():
    adamw, muon = make_optimizers(
        CoAtNet(config_of()), config("muon", peak_lr=0.25, beta1=0.8, beta2=0.95, weight_decay=0.125)
    )
    assert {group["betas"] for group in adamw.param_groups} == {(0.8, 0.95)}
    assert {group["weight_decay"] for group in adamw.param_groups} == {0.125, 0.0}
    assert {group["weight_decay"] for group in muon.param_groups} == {0.125}
    set_rate([adamw, muon], 0.5)
    assert {group["lr"] for optimizer in (adamw, muon) for group in optimizer.param_groups} == {0.5}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@given(rows=st.integers(1, 48), columns=st.integers(1, 48), seed=st.integers(0, 9))
def test_orthogonalised_keeps_the_vectors_and_evens_the_values(dtype: torch.dtype, rows: int, columns: int, seed: int):
    """Against the singular value decomposition in float64: values not tiny come near 1, along the same vectors."""
    matrix = torch.randn(2, rows, columns, generator=torch.Generator().manual_seed(seed))
    u, values, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    inside = u.mT @ orthogonalised(matrix, dtype).double() @ vh.mT
    relative = values / torch.linalg.vector_norm(values, dim=1, keepdim=True)
    new = inside.diagonal(dim1=1, dim2=2)[relative > 0.05]
    assert new.min() > 0.5, f"{new.min():.3f}"
    assert new.max() < 1.3, f"{new.max():.3f}"
    off = inside - torch.diag_embed(inside.diagonal(dim1=1, dim2=2))
    assert off.abs().max() < 0.1, f"{off.abs().max():.3f} off the diagonal"


@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 6, 3, 3)], ids=str)
def test_muon_against_its_equations(shape: tuple[int, ...]):
    """Two steps by the plain loop, with the same orthogonalisation; weights of one shape do not touch each other."""
    make = torch.Generator().manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, generator=make)) for _ in range(3)]
    want = [weight.detach().clone() for weight in weights]
    momenta = [torch.zeros(shape) for _ in weights]
    muon = Muon(weights, lr=0.01 / MUON_RATE, weight_decay=0.1)
    columns = math.prod(shape[1:])
    for _ in range(2):
        for weight, wanted, momentum in zip(weights, want, momenta, strict=True):
            weight.grad = torch.randn(shape, generator=make)
            momentum.mul_(0.95).add_(weight.grad, alpha=0.05)
            update = orthogonalised((0.05 * weight.grad + 0.95 * momentum).reshape(1, shape[0], columns), torch.float32)
            wanted.mul_(1 - 0.01 * 0.1)
            wanted.sub_(0.01 * MUON_RMS * max(shape[0], columns) ** 0.5 * update.view(shape))
        muon.step()
    for weight, wanted in zip(weights, want, strict=True):
        torch.testing.assert_close(weight.detach(), wanted, rtol=0, atol=1e-4)


def test_muon_leaves_alone_what_has_no_gradient():
    weights = [nn.Parameter(torch.ones(4, 4)) for _ in range(2)]
    weights[0].grad = torch.eye(4)
    Muon(weights, lr=0.1, weight_decay=0.1).step()
    assert not torch.equal(weights[0], torch.ones(4, 4))
    assert torch.equal(weights[1], torch.ones(4, 4))


MIDDLE = {"cosine": (1e-5 + 1e-3) / 2, "linear": (1e-5 + 1e-3) / 2, "constant": 1e-3}
QUARTER = {
    "cosine": 1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi / 4)) / 2,
    "linear": 1e-5 + (1e-3 - 1e-5) * 0.75,
    "constant": 1e-3,
}
END = {"cosine": 1e-5, "linear": 1e-5, "constant": 1e-3}


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_rate_over_a_run(schedule: Any):
    settings = config(peak_lr=1e-3, min_lr=1e-5, schedule=schedule)
    rate = lambda warmth, passed: learning_rate(settings, warmth, passed)  # noqa: E731
    assert rate(0.1, 0.0) == pytest.approx(1e-4), "the start of the warm-up"
    assert rate(0.5, 0.0) == pytest.approx(5e-4)
    assert rate(1.0, 0.0) == pytest.approx(1e-3), "the end of the warm-up"
    assert rate(1.0, 0.25) == pytest.approx(QUARTER[schedule])
    assert rate(1.0, 0.5) == pytest.approx(MIDDLE[schedule])
    assert rate(1.0, 1.0) == pytest.approx(END[schedule], abs=1e-12)
