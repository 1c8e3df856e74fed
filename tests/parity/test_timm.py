"""The whole network against timm's `coatnet_0..4_224`, with the paper's choices, through a map of the weights.

timm's plain rows differ from the paper in settings alone, all of which it takes as arguments: stride in the depthwise
convolution, average pooling, a stem without biases, eps. Its layout of the weights differs too: q, k and v are side by
side within each head, and a bias table is (offsets, heads).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from coatnet.bench.peers import timm_twin
from coatnet.bench.weights import scramble
from coatnet.config import ModelConfig
from coatnet.model.network import CoAtNet
from coatnet.zoo import ZOO


def pair(config: ModelConfig, image_size: int, **changes: object) -> tuple[CoAtNet, nn.Module]:
    """Build both with the same weights: random, none of them neutral, logits of order 1."""
    ours = CoAtNet(replace(config, image_size=(image_size, image_size))).eval()
    scramble(ours)
    return ours, timm_twin(ours, **changes)


@torch.no_grad()
def difference(ours: CoAtNet, theirs: nn.Module, image_size: int) -> tuple[float, float]:
    """Return the largest difference between the logits, and their standard deviation."""
    images = torch.randn(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(3))
    found, want = ours(images), theirs(images)
    return (found - want).abs().max().item(), want.std().item()


@pytest.mark.parametrize(
    "name",
    ["coatnet_0", *(pytest.param(f"coatnet_{n}", marks=pytest.mark.slow) for n in (1, 2, 3, 4))],
)
def test_logits_are_timms(name: str):
    met, scale = difference(*pair(ZOO[name].config, 224), 224)
    print(f"{name}: logits differ by {met:.1e} at most, of standard deviation {scale:.2f}")
    assert 0.3 < scale < 3, f"logits of deviation {scale:.2f}: the comparison needs them near 1"
    assert met < 1e-5, f"{name}: logits differ by {met:.1e}"


@pytest.mark.parametrize(
    "changes",
    [
        {"conv_stride_mode": "dw"},
        {"conv_pool_type": "avg2"},
        {"transformer_pool_type": "avg2"},
        {"conv_act_layer": "gelu_tanh"},
    ],
    ids=str,
)
def test_comparison_sees_a_different_choice(changes: dict[str, object]):
    """The comparison has teeth: one choice changed in timm's network moves the logits far beyond rounding."""
    config = replace(ZOO["coatnet_0"].config, image_size=(64, 64))
    met, _ = difference(*pair(config, 64, **changes), 64)
    assert met > 1e-4, f"{changes} moves the logits by {met:.1e} alone"
