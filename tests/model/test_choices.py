"""Every field of the config earns its place: changing it changes what the network answers, holds or learns."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from coatnet.config import ModelConfig
from coatnet.model.network import CoAtNet
from model.networks import config_of, images, network

VIT = "vit_rel"
CHOICES: list[tuple[str, str, dict[str, Any]]] = [  # of a network, what is changed
    ("layout", "CCTT", {"layout": "CCCC"}),
    ("layout", "CCTT", {"layout": "CCCT"}),
    ("layout", "CCTT", {"layout": "CTTT"}),
    ("layout", "CCTT", {"layout": "TTTT"}),
    ("blocks", "listing", {"blocks": "paper"}),
    ("depths", "CCTT", {"depths": (2, 1, 2, 1, 1)}),
    ("depths", VIT, {"depths": (6,)}),
    ("widths", "CCTT", {"widths": (4, 8, 16, 16, 16)}),
    ("widths", VIT, {"widths": (24,)}),
    ("s3_mbconv", "CCTT", {"s3_mbconv": (1, 8)}),
    ("strides", "CCTT", {"strides": (1, 2, 2, 2, 2)}),
    ("strides", "CCTT", {"strides": (2, 2, 2, 2, 1)}),
    ("patch_size", VIT, {"patch_size": 8}),
    ("head_dim", "CCTT", {"head_dim": 4}),
    ("relative_attention", "CCTT", {"relative_attention": "post"}),
    ("relative_attention", "CCTT", {"relative_attention": "none"}),
    ("attention", "CCTT", {"attention": "window"}),
    ("attention", "CCTT", {"attention": "linear"}),
    ("window_size", "windows", {"window_size": 3}),
    ("mbconv_norm", "CCTT", {"mbconv_norm": "layer"}),
    ("stride_in", "CCTT", {"stride_in": "depthwise"}),
    ("head", "CCTT", {"head": "plain"}),
    ("batch_norm_momentum", "CCTT", {"batch_norm_momentum": 0.5}),
    ("stochastic_depth_rate", "CCTT", {"stochastic_depth_rate": 0.5}),
    ("image_size", "CCTT", {"image_size": (64, 64)}),
    ("in_channels", "CCTT", {"in_channels": 1}),
    ("num_classes", "CCTT", {"num_classes": 6}),
]


def outcome(config: ModelConfig) -> tuple[list[tuple[int, ...]], Tensor, Tensor]:
    """Return the shapes of the weights, the logits of two training steps, and the logits in eval after them."""
    torch.manual_seed(0)
    model = network(config, training=True)
    shapes = [tuple(parameter.shape) for parameter in model.parameters()]
    trained = torch.stack([model(images(channels=config.in_channels, seed=step)) for step in (0, 1)])
    return shapes, trained.detach(), model.eval()(images(channels=config.in_channels)).detach()


@pytest.mark.parametrize(("field", "kind", "changes"), CHOICES, ids=lambda value: str(value))
def test_choice_changes_the_outcome(field: str, kind: str, changes: dict[str, Any]):
    base = config_of(kind)
    changed = replace(base, **changes)
    assert list(changes) == [field]
    assert getattr(base, field) != changes[field]
    (shapes, trained, evaluated), (new_shapes, new_trained, new_evaluated) = outcome(base), outcome(changed)
    if shapes != new_shapes:
        return
    assert not torch.allclose(trained, new_trained, atol=1e-4) or not torch.allclose(
        evaluated, new_evaluated, atol=1e-4
    ), f"{field} {getattr(base, field)} and {changes[field]} give the same network"


def test_every_field_is_among_the_choices():
    named = {field for field, _, _ in CHOICES} | {"name", "init"}  # init has the test below
    assert named == {field.name for field in fields(ModelConfig)}


@pytest.mark.parametrize("init", ["normal", "fan_in"])
def test_init_sets_the_deviation_of_the_weights(init: str):
    torch.manual_seed(0)
    model = CoAtNet(replace(config_of("CCTT"), widths=(32, 64, 64, 128, 128), head_dim=32, init=init))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear) and module.weight.numel() > 4000:
            want = 0.02 if init == "normal" else module.weight[0].numel() ** -0.5
            met = module.weight.std().item()
            assert met == pytest.approx(want, rel=0.1), f"{name}: {met:.4f}, not {want:.4f}"


def test_choices_without_weights_of_their_own_share_them():
    """Stride, form of the bias, window or not: the same weights load, so a study can change them alone."""
    state = CoAtNet(config_of()).state_dict()
    for changes in ({"stride_in": "depthwise"}, {"relative_attention": "post"}, {"stochastic_depth_rate": 0.3}):
        CoAtNet(replace(config_of(), **changes)).load_state_dict(state)


@pytest.mark.parametrize("stride_in", ["expand", "depthwise"])
def test_stride_sits_where_it_says(stride_in: Any):
    block = CoAtNet(config_of(stride_in=stride_in)).s1[0]
    strides = {"expand": block.expand.stride, "depthwise": block.depthwise.stride}
    assert strides[stride_in] == (2, 2)
    assert set(strides.values()) == {(1, 1), (2, 2)}


def test_second_part_of_s3_only_widens():
    """C-6 and C-7: MBConv takes the stride, the first attention block projects its shortcut without pooling."""
    s3 = CoAtNet(config_of("both kinds in S3")).s3
    assert [type(block).__name__ for block in s3] == ["MBConv", "Transformer", "Transformer"]
    assert [[type(part).__name__ for part in block.shortcut] for block in s3] == [["Pool"], ["Conv2d"], []]
