"""The moving average against a loop in float64."""

from __future__ import annotations

import pytest
import torch

from coatnet.model.network import CoAtNet
from coatnet.training.ema import Ema
from model.networks import config_of, network

DECAY = 0.6


def walk(model: CoAtNet, seed: int) -> None:
    """Move all weights and statistics."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.add_(torch.randn(tensor.shape, generator=generator))


def test_average_is_the_formula():
    model = network(config_of(), training=True)
    ema = Ema(model, DECAY)
    want = {name: tensor.double() for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    for n in range(1, 13):
        walk(model, n)
        ema.update(model, n)
        decay = min(DECAY, (1 + n) / (10 + n))  # young averages follow faster
        now = model.state_dict()
        want = {name: decay * old + (1 - decay) * now[name].double() for name, old in want.items()}
    found = ema.network.state_dict()
    assert (1 + 12) / (10 + 12) < DECAY < 1, "else the cap is not met"
    for name, value in want.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-5, msg=f"{name} is off")


def test_cap_of_the_decay():
    model = network(config_of())
    ema = Ema(model, 0.5)
    before = ema.network.classifier.weight.clone()
    walk(model, 0)
    ema.update(model, 1_000_000)
    torch.testing.assert_close(ema.network.classifier.weight, (before + model.classifier.weight) / 2)


def test_average_learns_nothing_and_evaluates():
    model = network(config_of(), training=True)
    ema = Ema(model, DECAY)
    assert not ema.network.training
    assert not any(parameter.requires_grad for parameter in ema.network.parameters())
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_what_stands_still_stays_bit_for_bit():
    """A frozen stage must not drift by rounding."""
    model = network(config_of())
    ema = Ema(model, 0.99)
    for n in range(1, 5):
        ema.update(model, n)
    for name, value in model.state_dict().items():
        assert torch.equal(ema.network.state_dict()[name], value), f"{name} drifted"


@pytest.mark.parametrize("n", [1, 10, 100])
def test_decay_of_zero_follows_at_once(n: int):
    model = network(config_of())
    ema = Ema(model, 0.0)
    walk(model, 3)
    ema.update(model, n)
    torch.testing.assert_close(ema.network.classifier.weight, model.classifier.weight)
