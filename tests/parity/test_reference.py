"""Each block and the whole network against the plain reference: answers, gradients, running statistics, rounding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coatnet.bench.weights import scramble
from coatnet.config import ModelConfig, Size
from coatnet.layout import BlockSpec
from coatnet.model.attention import RelativeBias, Transformer
from coatnet.model.mbconv import MBConv
from coatnet.model.network import CoAtNet
from parity.reference import Plain, resize_bilinear

SIZES = [(1, 1), (7, 7), (5, 9)]  # one cell, square, oblong
ROUNDING = 1e-10  # of float64, over the largest value of a tensor
BASE = ModelConfig(depths=(2, 1, 2, 2, 1), widths=(8, 8, 12, 16, 32), head_dim=8, num_classes=5, image_size=(40, 56))


def images_of(size: Size, channels: int, batch: int = 2, seed: int = 1) -> Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weights_of(module: nn.Module, at: str = "") -> dict[str, Tensor]:
    """Copy parameters, as leaves of a graph of their own, and statistics, under names that begin with `at`."""
    found = {at + name: value.detach().clone() for name, value in module.state_dict().items()}
    for name, _ in module.named_parameters():
        found[at + name].requires_grad_()
    return found


def assert_near(found: Tensor, want: Tensor, what: str) -> None:
    largest = max(1.0, want.abs().max().item())
    error = (found - want).abs().max().item() / largest
    assert error < ROUNDING, f"{what} differs by {error:.1e} of {largest:.2g}"


def assert_same(
    module: nn.Module, weights: dict[str, Tensor], at: str, found: Tensor, want: Tensor, x: Tensor, plain_x: Tensor
) -> None:
    """Compare the answers, the gradients of a random projection of them, and what BatchNorm keeps."""
    assert found.shape == want.shape
    assert_near(found, want, "the answer")
    direction = images_of((1, 1), found.numel(), 1).view(found.shape)
    names, parameters = zip(*module.named_parameters(), strict=True)
    leaves = [weights[at + name] for name in names]
    got = torch.autograd.grad((found * direction).sum(), [x, *parameters])
    wanted = torch.autograd.grad((want * direction).sum(), [plain_x, *leaves])
    for name, one, other in zip(["the input", *names], got, wanted, strict=True):
        assert_near(one, other, f"the gradient of {name}")
    for name, statistic in module.named_buffers():
        if not name.endswith("num_batches_tracked"):
            assert_near(statistic, weights[at + name], name)


def assert_block_same(
    module: MBConv | Transformer, run: Callable[..., Tensor], weights: dict[str, Tensor], size: Size, stride: int
) -> None:
    x, plain_x = (images_of(size, 8).requires_grad_() for _ in range(2))
    assert_same(module, weights, "b.", module(x), run("b", plain_x, stride), x, plain_x)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("norm", ["batch", "layer"])
@pytest.mark.parametrize("stride_in", ["expand", "depthwise"])
@pytest.mark.parametrize(("out_dim", "stride"), [(8, 1), (12, 1), (12, 2), (8, 2)])
@pytest.mark.parametrize("size", SIZES)
def test_mbconv_is_the_equation(size: Size, out_dim: int, stride: int, stride_in: Any, norm: Any, training: bool):
    config = replace(BASE, mbconv_norm=norm, stride_in=stride_in)
    block = MBConv(config, BlockSpec(1, "C", 8, out_dim, stride, (4, 4), 0.0)).double().train(training)
    scramble(block)
    weights = weights_of(block, "b.")
    assert_block_same(block, Plain(config, weights, training=training).mbconv, weights, size, stride)


@pytest.mark.parametrize("attention", ["global", "window", "linear"])
@pytest.mark.parametrize("relative", ["pre", "post", "none"])
@pytest.mark.parametrize(("out_dim", "stride"), [(8, 1), (16, 1), (16, 2), (8, 2)])
@pytest.mark.parametrize("size", SIZES)
def test_transformer_is_the_equation(size: Size, out_dim: int, stride: int, relative: Any, attention: Any):
    """The table fits a grid of 3 x 4, so it is interpolated here; the next test meets the grid it fits."""
    if attention == "linear" and relative != "none":
        pytest.skip("linear attention has no logits to add a bias to")
    config = replace(BASE, relative_attention=relative, attention=attention, window_size=3)
    block = Transformer(config, BlockSpec(3, "T", 8, out_dim, stride, (3, 4), 0.0)).double()
    scramble(block)
    weights = weights_of(block, "b.")
    assert_block_same(block, Plain(config, weights, training=True).transformer, weights, size, stride)


@pytest.mark.parametrize("relative", ["pre", "post"])
@pytest.mark.parametrize("size", SIZES)
def test_relative_attention_on_the_grid_its_table_fits(size: Size, relative: Any):
    config = replace(BASE, relative_attention=relative)
    block = Transformer(config, BlockSpec(3, "T", 8, 16, 1, size, 0.0)).double()
    scramble(block)
    weights = weights_of(block, "b.")
    assert_block_same(block, Plain(config, weights, training=True).transformer, weights, size, 1)


@pytest.mark.parametrize("relative", ["pre", "post"])
@pytest.mark.parametrize("size", [(7, 7), (5, 9), (1, 6)])
def test_every_scalar_of_the_table_learns(size: Size, relative: Any):
    block = Transformer(replace(BASE, relative_attention=relative), BlockSpec(3, "T", 8, 16, 1, size, 0.0)).double()
    scramble(block)
    table = block.attention.weigh.bias.table
    (gradient,) = torch.autograd.grad(block(images_of(size, 8)).square().sum(), table)
    assert table.shape == (2, 2 * size[0] - 1, 2 * size[1] - 1)
    assert (gradient != 0).all(), f"{(gradient == 0).sum()} of {gradient.numel()} scalars have no gradient"


def test_bias_is_the_table_at_query_minus_key():
    """Written for one table whose entries tell their own offset: P[dy, dx] = 10 dy + dx."""
    bias = RelativeBias(1, (3, 2)).double()
    with torch.no_grad():
        bias.table.copy_(10 * torch.arange(-2, 3)[:, None] + torch.arange(-1, 2)[None, :])
    laid_out = bias((3, 2))[0]
    for i in range(6):
        for j in range(6):
            dy, dx = i // 2 - j // 2, i % 2 - j % 2
            assert laid_out[i, j] == 10 * dy + dx, f"query {divmod(i, 2)}, key {divmod(j, 2)}"


@pytest.mark.parametrize("size", [(1, 1), (9, 3), (5, 7), (13, 1), (2, 4)])
def test_plain_resize_is_bilinear(size: Size):
    """Hold the reference's own interpolation to torch's, which the network uses."""
    table = images_of((5, 7), 1, 1)[0, 0]
    want = nn.functional.interpolate(table[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    assert_near(resize_bilinear(table, size), want, f"5 x 7 to {size}")


NETWORKS = {
    "CCTT": {},
    "CCCC": {"layout": "CCCC"},
    "CTTT": {"layout": "CTTT", "widths": (8, 8, 16, 24, 32)},
    "TTTT, strides in S0 and S1": {"layout": "TTTT", "widths": (8, 8, 8, 16, 16), "strides": (2, 2, 1, 1, 1)},
    "vit_rel": {"layout": "vit_rel", "depths": (5,), "widths": (16,), "patch_size": 9},
    "both kinds in S3": {"s3_mbconv": (2, 12), "widths": (8, 8, 12, 32, 32)},
    "post, layer norm, depthwise stride": {
        "relative_attention": "post",
        "mbconv_norm": "layer",
        "stride_in": "depthwise",
    },
    "windows": {"attention": "window", "window_size": 2},
    "linear": {"attention": "linear"},
}


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("size", [*SIZES, (40, 56), (61, 35)])
@pytest.mark.parametrize("network", NETWORKS)
def test_network_is_the_equations(network: str, size: Size, training: bool):
    """In training with stochastic depth, every branch both kept and dropped by the draws."""
    if training and max(size) < 5:
        pytest.skip("BatchNorm has nothing to train on in one cell: its variance is of rounding alone")
    config = replace(BASE, stochastic_depth_rate=0.6, batch_norm_momentum=0.3, **NETWORKS[network])
    model = CoAtNet(config).double().train(training)
    scramble(model)
    weights = weights_of(model)
    x, plain_x = (images_of(size, 3, batch=3).requires_grad_() for _ in range(2))
    draws = torch.rand(3, model.num_depth_draws, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = model(x, draws)
    want = Plain(config, weights, training=training).logits(plain_x, draws)
    assert_same(model, weights, "", found, want, x, plain_x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("size", [(1, 1), (40, 56), (61, 35)])
@pytest.mark.parametrize("network", NETWORKS)
def test_network_errs_no_more_than_the_plain_one(network: str, size: Size, dtype: torch.dtype):
    config = replace(BASE, **NETWORKS[network])
    model = CoAtNet(config).double().eval()
    scramble(model)
    images = images_of(size, 3, batch=4)
    model.to(dtype)  # rounds the weights: from here on they are exact, and only the arithmetic differs
    with torch.no_grad():
        truth = Plain(config, weights_of(model.double()), training=False).logits(images.to(dtype).double())
        model.to(dtype)
        plain = (Plain(config, weights_of(model), training=False).logits(images.to(dtype)) - truth).abs()
        ours = (model(images.to(dtype)) - truth).abs()
    assert ours.mean() <= 1.5 * plain.mean() + torch.finfo(dtype).eps, (
        f"the network errs by {ours.mean():.1e}, the plain one by {plain.mean():.1e}"
    )
