"""The whole network against timm's `coatnet_0..4_224`, with the paper's choices, through a map of the weights.

timm's plain rows differ from the paper in settings alone, all of which it takes as arguments: stride in the depthwise
convolution, average pooling, a stem without biases, eps. Its layout of the weights differs too: q, k and v are side by
side within each head, and a bias table is (offsets, heads).
"""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import timm
import torch
from torch import Tensor, nn

from coatnet.bench.weights import scramble
from coatnet.config import ModelConfig
from coatnet.model.layers import BATCH_NORM_EPS, LAYER_NORM_EPS
from coatnet.model.network import CoAtNet
from coatnet.zoo import ZOO

PAPERS_CHOICES = {
    "conv_stride_mode": "1x1",
    "conv_pool_type": "max2",
    "transformer_pool_type": "max2",
    "stem_bias": True,
}
NAMES = {  # ours -> timm's, in this order
    r"^s0\.0\.": "stem.conv1.",
    r"^s0\.1\.": "stem.norm1.",
    r"^s0\.3\.": "stem.conv2.",
    r"^s([1-4])\.": lambda m: f"stages.{int(m[1]) - 1}.blocks.",
    r"\.shortcut\.[01]\.": ".shortcut.expand.",
    r"\.squeeze_excite\.reduce\.": ".se.fc1.",
    r"\.squeeze_excite\.expand\.": ".se.fc2.",
    r"\.expand_norm\.": ".norm1.",
    r"\.depthwise_norm\.": ".norm2.",
    r"\.norm\.": ".pre_norm.",
    r"(\d)\.expand\.": r"\1.conv1_1x1.",
    r"\.depthwise\.": ".conv2_kxk.",
    r"\.shrink\.": ".conv3_1x1.",
    r"\.attention_norm\.": ".norm1.",
    r"\.ffn_norm\.": ".norm2.",
    r"\.ffn\.0\.": ".mlp.fc1.",
    r"\.ffn\.2\.": ".mlp.fc2.",
    r"\.attention\.qkv\.": ".attn.qkv.",
    r"\.attention\.project\.": ".attn.proj.",
    r"\.attention\.weigh\.bias\.table": ".attn.rel_pos.relative_position_bias_table",
    r"^norm\.": "head.norm.",
    r"^pre_logits\.": "head.pre_logits.fc.",
    r"^classifier\.": "head.fc.",
}


def timms_name(name: str, theirs: dict[str, Tensor]) -> str:
    for pattern, replacement in NAMES.items():
        name = re.sub(pattern, replacement, name)
    in_a_block_that_strides = name.replace(".norm1.", ".norm1.norm.")
    return in_a_block_that_strides if in_a_block_that_strides in theirs else name


def timms_weights(model: CoAtNet, theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename and reorder our weights for timm; every one of timm's is met exactly once."""
    found: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        target = timms_name(name, theirs)
        assert target in theirs, f"{name} has no counterpart; {target} is not timm's"
        assert target not in found, f"{name} and another are both {target}"
        if name.endswith("table"):
            value = value.flatten(1).T
        elif ".qkv." in name:
            value = value.unflatten(0, (3, -1, model.config.head_dim)).transpose(0, 1).flatten(0, 2)
        found[target] = value.reshape(theirs[target].shape)
    left = sorted(set(theirs) - set(found) - {name for name in theirs if name.endswith("relative_position_index")})
    assert not left, f"timm has more: {left}"
    return found


def pair(config: ModelConfig, image_size: int, **changes: object) -> tuple[CoAtNet, nn.Module]:
    """Build both with the same weights: random, none of them neutral, logits of order 1."""
    ours = CoAtNet(config).eval()
    scramble(ours)
    theirs = timm.create_model(f"{config.name}_224", img_size=image_size, **{**PAPERS_CHOICES, **changes}).eval()
    theirs.load_state_dict(timms_weights(ours, theirs.state_dict()), strict=False)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = BATCH_NORM_EPS
        elif isinstance(module, nn.LayerNorm):
            module.eps = LAYER_NORM_EPS
    return ours, theirs


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
