"""Losses against the formulas in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from coatnet.training.losses import loss_of, soft_targets

B, K = 6, 5
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 4, (B, K))
TARGETS = RNG.integers(0, K, B)


@pytest.mark.parametrize("smoothing", [0.0, 0.0001, 0.1, 0.9])
def test_soft_targets(smoothing: float):
    rows = soft_targets(torch.from_numpy(TARGETS), K, smoothing)
    want = np.eye(K)[TARGETS] * (1 - smoothing) + smoothing / K
    np.testing.assert_allclose(rows.numpy(), want, rtol=1e-6, atol=1e-9)
    assert rows.dtype == torch.float32


def softmax_loss(targets: np.ndarray) -> float:
    total = 0.0
    for row, wanted in zip(LOGITS, targets, strict=True):
        normaliser = math.log(sum(math.exp(value) for value in row))
        total += sum(-share * (value - normaliser) for value, share in zip(row, wanted, strict=True))
    return total / B


def sigmoid_loss(targets: np.ndarray) -> float:
    total = 0.0
    for row, wanted in zip(LOGITS, targets, strict=True):
        for value, share in zip(row, wanted, strict=True):
            p = 1 / (1 + math.exp(-value))
            total -= share * math.log(p) + (1 - share) * math.log(1 - p)
    return total / B


@pytest.mark.parametrize(("kind", "formula"), [("softmax", softmax_loss), ("sigmoid", sigmoid_loss)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_the_formula(kind, formula, smoothing: float):
    targets = soft_targets(torch.from_numpy(TARGETS), K, smoothing)
    found = loss_of(kind, torch.from_numpy(LOGITS).float(), targets)
    assert found.shape == ()
    assert found.item() == pytest.approx(formula(targets.double().numpy()), rel=1e-5)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_bf16_logits_are_reduced_in_float32(kind):
    logits = torch.from_numpy(LOGITS).bfloat16()
    targets = soft_targets(torch.from_numpy(TARGETS), K, 0.1)
    assert loss_of(kind, logits, targets).dtype == torch.float32
    assert loss_of(kind, logits, targets) == loss_of(kind, logits.float(), targets)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_huge_logits_stay_finite(kind):
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]])
    targets = soft_targets(torch.tensor([1, 1]), 3, 0.0)
    assert loss_of(kind, logits, targets).isfinite()
