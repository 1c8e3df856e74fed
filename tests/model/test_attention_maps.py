"""Attention weights on request."""

from __future__ import annotations

import pytest
import torch

from coatnet.errors import ConfigError
from model.networks import config_of, images, network


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        ("CCTT", [(2, 2, 6, 6), (2, 2, 6, 6), (2, 2, 2, 2)]),
        ("CCCT", [(2, 2, 2, 2)]),
        ("both kinds in S3", [(2, 2, 6, 6), (2, 2, 6, 6), (2, 2, 2, 2)]),
        ("none", [(2, 2, 6, 6), (2, 2, 6, 6), (2, 2, 2, 2)]),
        ("vit_rel", [(2, 2, 35, 35)] * 5),
        ("windows", [(2, 2, 2, 4, 4), (2, 2, 2, 4, 4), (2, 1, 2, 4, 4)]),
    ],
)
@torch.no_grad()
def test_each_row_is_a_distribution(kind: str, shapes: list[tuple[int, ...]]):
    model = network(config_of(kind))
    maps = model.attention_maps(images())
    assert [tuple(found.shape) for found in maps] == shapes
    for found in maps:
        torch.testing.assert_close(found.sum(dim=-1), torch.ones(found.shape[:-1]))
        assert (found >= 0).all()
    assert not any(module._forward_hooks for module in model.modules()), "a hook was left behind"


@torch.no_grad()
def test_window_gives_no_weight_to_cells_beyond_the_edge():
    """A grid of 3 x 3 in windows of 2: the last windows hold two cells and one."""
    model = network(config_of("windows", image_size=(48, 48)))
    weights = model.attention_maps(images(1, (48, 48)))[0]
    assert weights.shape == (1, 4, 2, 4, 4)
    seen = (weights[0] > 0).any(dim=(1, 2))  # a window's keys, over heads and queries
    assert seen.tolist() == [[True] * 4, [True, False] * 2, [True, True, False, False], [True, False, False, False]]


@torch.no_grad()
def test_post_adds_the_bias_after_the_softmax():
    model = network(config_of("post"))
    last = model.attention_maps(images())[-1]
    assert model.s4[0].attention.weigh.bias is not None
    softmax = last - model.s4[0].attention.weigh.bias((1, 2))
    torch.testing.assert_close(softmax.sum(dim=-1), torch.ones(2, 2, 2))


@pytest.mark.parametrize("kind", ["CCCC", "linear"])
def test_without_weights_it_says_so(kind: str):
    model = network(config_of(kind))
    with pytest.raises(ConfigError, match=r"has no attention weights\. Use a network with T stages"):
        model.attention_maps(images())
