"""Small networks of every kind, for the tests of this folder."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from coatnet.bench.weights import scramble
from coatnet.config import ModelConfig, Size
from coatnet.model.network import CoAtNet

BASE = ModelConfig(depths=(2, 1, 1, 2, 1), widths=(4, 8, 8, 16, 16), head_dim=8, num_classes=5, image_size=(32, 48))
KINDS: dict[str, dict[str, Any]] = {
    "CCTT": {},
    "CCCC": {"layout": "CCCC"},
    "CCCT": {"layout": "CCCT"},
    "CTTT": {"layout": "CTTT"},
    "TTTT": {"layout": "TTTT"},
    "vit_rel": {"layout": "vit_rel", "depths": (5,), "widths": (16,), "patch_size": 7},
    "both kinds in S3": {"s3_mbconv": (1, 8)},
    "post": {"relative_attention": "post"},
    "none": {"relative_attention": "none"},
    "windows": {"attention": "window", "window_size": 2},
    "linear": {"attention": "linear"},
    "layer norm": {"mbconv_norm": "layer"},
    "depthwise stride": {"stride_in": "depthwise"},
    "few strides": {"strides": (1, 2, 1, 2, 1), "depths": (3, 1, 1, 2, 1)},  # and a stem of three convolutions
    "heads of 32": {"head_dim": 32, "widths": (4, 8, 8, 32, 64)},  # as in the paper
    "heads of 32, no bias": {"head_dim": 32, "widths": (4, 8, 8, 32, 64), "relative_attention": "none"},
    "listing": {"blocks": "listing", "head": "plain", "head_dim": 32, "widths": (4, 8, 8, 32, 32)},
}


def config_of(kind: str = "CCTT", **changes: Any) -> ModelConfig:
    return replace(BASE, **{**KINDS[kind], **changes})


def network(config: ModelConfig = BASE, *, seed: int = 0, training: bool = False) -> CoAtNet:
    """Build with weights and statistics of which none is neutral."""
    model = CoAtNet(config).train(training)
    scramble(model, seed)
    return model


def images(batch: int = 2, size: Size = (32, 48), channels: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(seed))


def want_shapes(config: ModelConfig, batch: int, size: Size) -> list[tuple[int, ...]]:
    """Return the shapes of the five maps: ceil(n / stride) of the grid before."""
    shapes = []
    for stage in range(5):
        if config.layout == "vit_rel":
            stride, width = (config.patch_size if stage == 0 else 1), config.widths[0]
        else:
            stride, width = config.strides[stage], config.widths[stage]
        size = (math.ceil(size[0] / stride), math.ceil(size[1] / stride))
        shapes.append((batch, width, *size))
    return shapes


def statistics(model: CoAtNet) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.named_buffers()}


def assert_equal(found: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    """Bit for bit, naming the first tensor that differs."""
    assert found.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(found[name], value), f"{name} differs by {(found[name] - value).abs().max():.1e}"
