"""The kernels alone against float64, at the widths and heights where they change their way."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from coatnet import native
from coatnet.fast.batch_norm import BatchNorms, Moments, normed, normed_slope, normed_sums
from coatnet.fast.fused_mbconv import Gate, Weights, gate_slopes
from coatnet.fast.kernels import (
    GatedWeight,
    Weight,
    WeightSlope,
    norm_rows,
    norm_slope,
    pool,
    pool_slope,
    run_map,
    scaled,
    to_be_gated,
    total,
)
from coatnet.fast.operations import run
from coatnet.fast.packing import pack

pytestmark = pytest.mark.skipif(native.missing("bf16") is not None, reason=f"{native.missing('bf16')}")
TOLERANCE = 0.01  # of the largest value: bf16 keeps 8 bits


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).bfloat16()


def assert_near(found: torch.Tensor, want: torch.Tensor, what: str) -> None:
    error = ((found.double() - want).abs().max() / want.abs().max()).item()
    assert error < TOLERANCE, f"{what} errs by {error:.2%}"


@pytest.mark.parametrize("width", [4, 16, 20, 32, 40, 48, 64])
@pytest.mark.parametrize("depth", [6, 360, 4000])
@torch.no_grad()
def test_a_product_of_any_width_height_and_depth(width: int, depth: int):
    """Half panels and whole ones, tiles of 14 rows and fewer; a depth of 4,000 is done in parts."""
    weight, bias = noise(depth, width).float(), noise(width).float()
    for rows in (1, 3, 7, 13, 30):
        x = noise(rows, depth)
        want = x.double() @ weight.double() + bias.double()
        assert_near(Weight(weight, bias).product(x), want, f"{rows} rows")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (32, 16), (64, 31), (97, 130)])
def test_weights_are_packed_alike_in_either_order(shape: tuple[int, int], transposed: bool):
    depth, width = shape
    weight = noise(width, depth).float().T if transposed else noise(depth, width).float()
    want = pack(F.pad(weight, (0, 0, 0, depth % 2)), "BF16")
    assert torch.equal(Weight(weight).packed, want.view_as(Weight(weight).packed))


@pytest.mark.parametrize("width", [8, 10, 12, 20, 40, 64, 70, 96, 230])
def test_the_gradient_of_a_weight_of_any_width(width: int):
    """Tiles of 8, 10 or 12 rows, full or not; either factor wider; pixels beyond what is summed at once."""
    for depth, pixels in ((100, 1500), (128, 33), (6, 450)):
        slope, x = noise(pixels, width), noise(pixels, depth)
        found, bias = WeightSlope(width, depth).add(slope, x).add(slope, x).total()
        assert_near(found, 2 * slope.double().T @ x.double(), f"{depth} deep, {pixels} pixels")
        assert_near(bias, 2 * slope.double().sum(dim=0), f"bias, {depth} deep, {pixels} pixels")


@pytest.mark.parametrize("side", [2, 3, 4, 5])
@torch.no_grad()
def test_gates_scale_the_map_or_the_weights(side: int):
    """16 columns: maps of 4 and 9 pixels are gated themselves, of 16 and 25 their weights."""
    x, gates, weight, bias = noise(3, side, side, 24), noise(3, 24).float(), noise(16, 24).float(), noise(16).float()
    want = (x.double() * gates.double()[:, None, None]) @ weight.double().T + bias.double()
    out = x.new_empty(3, side, side, 16)
    GatedWeight(*to_be_gated(weight, bias, images=3, pixels=side * side), width=16).product(x, gates, out)
    assert_near(out, want, f"{side * side} pixels")


def test_a_profile_tells_kinds_apart_and_ends():
    x, weight = noise(64, 256), Weight(noise(256, 256).float())
    with native.profiled() as seconds:
        weight.product(x)
        WeightSlope(256, 256).add(x, x)
    assert set(seconds) == {"PRODUCT", "WEIGHT_SLOPE"}, seconds
    assert min(seconds.values()) > 0
    before = dict(seconds)
    weight.product(x)
    assert seconds == before, "what came after the profile was counted"


@torch.no_grad()
def test_residuals_are_added_even_in_place():
    x, weight, past = noise(30, 64), noise(64, 40).float(), noise(30, 40)
    want = x.double() @ weight.double() + past.double()
    assert_near(Weight(weight).product(x, residual=past), want, "a residual")
    assert_near(Weight(weight).product(x, out=past, residual=past), want, "a residual in place")


@pytest.mark.parametrize("channels", [4, 20, 64])
def test_branches_are_scaled_image_by_image(channels: int):
    x, past, scale = noise(3, 5, 7, channels), noise(7, 5, 3, channels).view(3, 5, 7, channels), noise(3).float()
    want = x.double() * scale.double().view(-1, 1, 1, 1)
    assert_near(scaled(x, scale), want, "a branch")
    assert_near(scaled(x, scale, past), want + past.double(), "a branch and what goes past it")


def slopes_of(out: torch.Tensor, slope: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(out, inputs, slope.double())


@pytest.mark.parametrize("channels", [4, 16, 24, 192])
def test_layer_norm_and_its_way_back(channels: int):
    x, slope, past = noise(2, 3, 5, channels), noise(2, 5, 3, channels).view(2, 3, 5, channels), noise(30, channels)
    weight, bias = 1 + noise(channels).float() / 4, noise(channels).float()
    doubles = [part.detach().double().requires_grad_() for part in (x, weight, bias)]
    out = F.layer_norm(doubles[0], (channels,), *doubles[1:], eps=1e-5)
    want = slopes_of(out, slope, *doubles)
    assert_near(norm_rows(x, weight, bias), out.detach(), "the norm")
    found, sums = norm_slope(x, slope.clone(), weight, past.view_as(x))
    assert_near(found, want[0] + past.view_as(x).double(), "the gradient of the map")
    for number, what in enumerate(("weight", "bias")):
        assert_near(sums[number], want[1 + number], f"the gradient of the {what}")


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (5, 4), (4, 7), (9, 9)])
def test_pooling_and_its_way_back(size: tuple[int, int]):
    """At odd edges too; of equal values the first one takes the gradient, as in torch."""
    x = noise(2, *size, 20).mul(2).round()  # many are equal
    doubles = x.double().requires_grad_()
    out = F.max_pool2d(doubles.permute(0, 3, 1, 2), 2, 2, ceil_mode=True).permute(0, 2, 3, 1)
    slope = noise(*out.shape)
    assert torch.equal(pool(x).double(), out)
    assert torch.equal(pool_slope(x, slope, torch.full_like(x, 7.0)).double(), slopes_of(out, slope, doubles)[0])


@pytest.mark.parametrize("place", range(4))
def test_pooling_keeps_what_is_no_number(place: int):
    x = noise(1, 2, 2, 16)
    x[0, place // 2, place % 2, 3] = float("nan")
    found = pool(x)[0, 0, 0]
    assert found[3].isnan()
    assert found.isnan().sum() == 1


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [4, 20, 32])
def test_batch_norm_before_a_stride_and_its_way_back(channels: int, stride: int):
    x, past = noise(3, 5, 7, channels) + 1, noise(7, 5, 3, channels).view(3, 5, 7, channels)
    norm = torch.nn.BatchNorm2d(channels, eps=1e-3).train()
    with torch.no_grad():
        norm.weight.copy_(noise(channels).float())
        norm.bias.copy_(noise(channels, 1).float()[:, 0])
    twin = torch.nn.BatchNorm2d(channels, eps=1e-3).train()
    twin.load_state_dict(norm.state_dict())
    twin.double()
    doubles = x.double().requires_grad_()
    want_out = twin(doubles.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)[:, ::stride, ::stride]
    slope = noise(*want_out.shape)
    want = slopes_of(want_out, slope, doubles, twin.weight, twin.bias)
    running = norm.running_mean, norm.running_var
    numbers = (norm.eps, norm.momentum)
    moments = Moments.of(run_map("MOMENTS", x), x[..., 0].numel(), (norm.weight, norm.bias), running, numbers)
    BatchNorms(norm).count_batch()
    for name, value in twin.named_buffers():
        assert torch.allclose(norm.get_buffer(name).double(), value.double(), rtol=1e-4), f"{name} is another"
    assert_near(normed(x, moments, stride), want_out.detach(), "the norm")
    sums, out = torch.empty(*slope.shape[:2], 2, channels), torch.empty_like(x)
    normed_sums(x, slope, stride, sums)
    weight_slope, bias_slope, mix = moments.backward(sums)
    normed_slope(x, slope, stride, mix, past, out)
    assert_near(weight_slope, want[1], "the gradient of the weight")
    assert_near(bias_slope, want[2], "the gradient of the bias")
    assert_near(out, want[0] + past.double(), "the gradient of the map")


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_squeeze_excite_and_its_way_back(batch: int):
    """The gates of a map, and with their gradients what reaches each pixel and the weights."""
    channels, squeezed, pixels = 40, 6, 12
    x, slope = noise(batch, 3, 4, channels), noise(batch, channels).float()
    shapes = (squeezed, channels, 1, 1), (squeezed,), (channels, squeezed, 1, 1), (channels,)
    weights = [noise(*shape).float() / 4 for shape in shapes]
    doubles = [part.double().requires_grad_() for part in (x, *weights)]
    means = doubles[0].mean(dim=(1, 2))
    hidden = F.silu(F.linear(means, doubles[1].flatten(1), doubles[2]))
    want = F.linear(hidden, doubles[3].flatten(1), doubles[4]).sigmoid()
    want_slopes = slopes_of(want, slope, *doubles)
    empty = torch.empty(0, 0)
    w = Weights(*[empty] * 8, *weights, *[empty] * 2, None, None)
    gate = Gate(w.as_read(), pixels)
    of_map = x.float().sum(dim=(1, 2))
    assert_near(gate.gates(torch.stack([of_map, of_map], dim=1)[:, None].contiguous()), want.detach(), "the gates")
    kept = gate.room(batch)
    gates, by_pixel = gate.backward(torch.stack([slope, of_map], dim=1)[:, None].contiguous(), kept)
    assert_near(gates, want.detach(), "the gates again")
    assert_near(by_pixel, want_slopes[0][:, 0, 0], "what reaches a pixel")
    names = ("reduce", "its bias", "excite", "its bias")
    for found, wanted, name in zip(gate_slopes(kept, w), want_slopes[1:], names, strict=True):
        assert_near(found, wanted, f"the gradient of {name}")


@pytest.mark.parametrize("relative", ["PRE", "NONE"])
@pytest.mark.parametrize("grid", [(1, 2), (4, 4), (3, 9), (7, 7), (14, 14)])
def test_attention_and_its_way_back(grid: tuple[int, int], relative: str):
    """Rows of 14 queries and fewer, panels of keys full and not, a grid of one line; biases by offset."""
    (H, W), images, heads = grid, 2, 3
    N, C = H * W, heads * 32
    qkv, slope, bias = noise(images, H, W, 3 * C), noise(images, H, W, C), noise(heads, 2 * H - 1, 2 * W - 1).float()
    fields = {
        "type": native.TYPES["BF16"], "out_type": native.TYPES["BF16"], "images": images, "lines": H, "cells": W,
        "width": C, "heads": heads, "head_dim": 32, "relative": native.RELATIVES[relative],
        "bias": bias if relative == "PRE" else 0,
    }  # fmt: skip
    out, qkv_slope, bias_slope = torch.empty_like(slope), torch.empty_like(qkv), torch.zeros_like(bias)
    noted = torch.empty(images, heads, 2, N)
    run("ATTENTION", source=qkv, out=out, sums=noted, **fields)
    run(
        "ATTENTION_SLOPE", source=qkv, residual=out, sums=noted, gradient=slope, weight_sums=bias_slope, out=qkv_slope,
        **fields,
    )  # fmt: skip
    doubles = [qkv.double().requires_grad_(), bias.double().requires_grad_()]
    q, k, v = doubles[0].view(images, N, 3, heads, 32).permute(2, 0, 3, 1, 4)
    line, cell = torch.arange(N) // W, torch.arange(N) % W
    logits = q @ k.transpose(-2, -1) / 32**0.5
    if relative == "PRE":
        logits = logits + doubles[1][:, line - line[:, None] + H - 1, cell - cell[:, None] + W - 1]
    want = (logits.softmax(dim=-1) @ v).transpose(1, 2).reshape(images, H, W, C)
    want_slopes = torch.autograd.grad(want, doubles, slope.double(), allow_unused=True)
    assert_near(out, want.detach(), "attention")
    assert_near(qkv_slope, want_slopes[0], "the gradient of queries, keys and values")
    if relative == "PRE":
        assert_near(bias_slope, want_slopes[1], "the gradient of the biases")


@pytest.mark.parametrize("type_", ["FP32", "BF16"])
@pytest.mark.parametrize("grid", [(1, 1), (3, 9), (7, 7), (14, 14)])
def test_attention_with_biases_after_the_softmax(grid: tuple[int, int], type_: str):
    """In memory where another network's NaN have been: an odd number of tokens reads none of them."""
    dtype = torch.float32 if type_ == "FP32" else torch.bfloat16
    (H, W), images, heads = grid, 2, 3
    N, C = H * W, heads * 32

    def attend(qkv: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        lines, cells = qkv.shape[1:3]
        out = torch.empty(images, lines, cells, C, dtype=dtype)
        run(
            "ATTENTION", type=native.TYPES[type_], out_type=native.TYPES[type_], images=images, lines=lines,
            cells=cells, width=C, heads=heads, head_dim=32, relative=native.RELATIVES["POST"], bias=bias, source=qkv,
            out=out,
        )  # fmt: skip
        return out

    attend(noise(images, 20, 20, 3 * C).to(dtype), torch.full((heads, 39, 39), torch.nan))
    qkv, bias = noise(images, H, W, 3 * C).to(dtype), noise(heads, 2 * H - 1, 2 * W - 1).float()
    out = attend(qkv, bias)
    q, k, v = qkv.double().view(images, N, 3, heads, 32).permute(2, 0, 3, 1, 4)
    line, cell = torch.arange(N) // W, torch.arange(N) % W
    weights = (q @ k.transpose(-2, -1) / 32**0.5).softmax(dim=-1)
    weights = weights + bias.double()[:, line - line[:, None] + H - 1, cell - cell[:, None] + W - 1]
    assert_near(out, (weights @ v).transpose(1, 2).reshape(images, H, W, C), "attention")


def test_sums_of_many_rows_are_as_of_doubles():
    rows = torch.randn(5000, 9, 24, generator=torch.Generator().manual_seed(0)) * 1e3
    assert torch.equal(total(rows), rows.double().sum(dim=0).float())


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 2, 1), (3, 1, 1), (4, 4, 0)])
@pytest.mark.parametrize("layout", ["planes", "pixels", "columns"])
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("type_", ["FP32", "BF16"])
def test_patches_stay_in_their_lines(channels: int, type_: str, layout: str, kernel: int, stride: int, padding: int):
    """Against torch's own, on more threads than cores; what lies behind the last patch is left alone."""
    height, cells = 11, 37
    x = noise(2, channels, height, cells).float()
    if layout == "pixels":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "columns":
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    dtype = torch.float32 if type_ == "FP32" else torch.bfloat16
    values = kernel**2 * channels
    width, size = values + values % 2, (-(-height // stride), -(-cells // stride))
    out = torch.full((2 * size[0] * size[1] * width + 64,), 7.0, dtype=dtype)
    image, channel, line, cell = (4 * step for step in x.stride())
    op = native.Op(
        kind=native.KINDS["UNFOLD"], out_type=native.TYPES[type_], images=2, lines=size[0], cells=size[1],
        depth=channels, width=width, in_lines=height, in_cells=cells, kernel=kernel, stride=stride, padding=padding,
        source=x.data_ptr(), source_image=image, source_channel=channel, source_line=line, source_cell=cell,
        out=out.data_ptr(),
    )  # fmt: skip
    beyond = [(n - 1) * stride + kernel - padding - side for n, side in zip(size, (height, cells), strict=True)]
    want = F.unfold(F.pad(x, (padding, beyond[1], padding, beyond[0])), kernel, stride=stride)
    want = want.unflatten(1, (channels, kernel**2)).permute(0, 3, 2, 1).flatten(2)
    for _ in range(10):
        native.run((native.Op * 1)(op), 5)
        found = out[:-64].view(2, size[0] * size[1], width)
        assert torch.equal(found[..., :values].float(), want)
        assert not found[..., values:].any(), "what fills a patch up is no zero"
        assert (out[-64:] == 7).all(), "something was written behind the last patch"
