"""AdamW: which weights decay, and the rate at each moment."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from coatnet.config import OptimizerConfig
from coatnet.model.network import CoAtNet
from coatnet.training.optimizer import learning_rate, make_optimizer, set_rate
from coatnet.training.start import freeze
from model.networks import KINDS, config_of


def decaying(network: torch.nn.Module, optimizer: torch.optim.Optimizer) -> set[str]:
    """Return the names of the parameters in groups that decay."""
    inside = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    return {name for name, parameter in network.named_parameters() if id(parameter) in inside}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_decay_and_nothing_else(kind: str):
    """What has one dimension is a norm or a bias; of the rest only bias tables are no weights."""
    network = CoAtNet(config_of(kind))
    optimizer = make_optimizer(network, OptimizerConfig())
    want = {name for name, p in network.named_parameters() if p.ndim >= 2 and not name.endswith("table")}
    assert decaying(network, optimizer) == want
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in network.parameters()), "each parameter is in one group, once"


def test_without_a_gradient_only_decay_moves_weights():
    network = CoAtNet(config_of())
    optimizer = make_optimizer(network, OptimizerConfig(weight_decay=0.5))
    set_rate(optimizer, 0.1)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    weights = decaying(network, optimizer)
    for name, parameter in network.named_parameters():
        factor = 1 - 0.1 * 0.5 if name in weights else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor, msg=f"{name} should scale by {factor}")


def test_what_is_frozen_is_in_no_group():
    network = CoAtNet(config_of())
    freeze(network, "S4")
    optimizer = make_optimizer(network, OptimizerConfig())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    names = {name for name, p in network.named_parameters() if id(p) in held}
    assert {name.split(".")[0] for name in names} == {"norm", "pre_logits", "classifier"}


def test_settings_reach_the_optimizer():
    config = OptimizerConfig(peak_lr=0.25, beta1=0.8, beta2=0.95, weight_decay=0.125)
    optimizer = make_optimizer(CoAtNet(config_of()), config)
    assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.95)}
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.125, 0.0}
    set_rate(optimizer, 0.5)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}


MIDDLE = {"cosine": (1e-5 + 1e-3) / 2, "linear": (1e-5 + 1e-3) / 2, "constant": 1e-3}
QUARTER = {
    "cosine": 1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi / 4)) / 2,
    "linear": 1e-5 + (1e-3 - 1e-5) * 0.75,
    "constant": 1e-3,
}
END = {"cosine": 1e-5, "linear": 1e-5, "constant": 1e-3}


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_rate_over_a_run(schedule: Any):
    config = OptimizerConfig(peak_lr=1e-3, min_lr=1e-5, schedule=schedule)
    rate = lambda warmth, passed: learning_rate(config, warmth, passed)  # noqa: E731
    assert rate(0.1, 0.0) == pytest.approx(1e-4), "the start of the warm-up"
    assert rate(0.5, 0.0) == pytest.approx(5e-4)
    assert rate(1.0, 0.0) == pytest.approx(1e-3), "the end of the warm-up"
    assert rate(1.0, 0.25) == pytest.approx(QUARTER[schedule])
    assert rate(1.0, 0.5) == pytest.approx(MIDDLE[schedule])
    assert rate(1.0, 1.0) == pytest.approx(END[schedule], abs=1e-12)
