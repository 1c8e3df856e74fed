"""The kernels' products alone against float64, at the widths and heights where they change their way."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from coatnet import native
from coatnet.fast.kernels import GatedWeight, Weight, WeightSlope
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
        found = WeightSlope(width, depth).add(slope, x).add(slope, x).total
        assert_near(found, 2 * slope.double().T @ x.double(), f"{depth} deep, {pixels} pixels")


@pytest.mark.parametrize("side", [2, 3, 4, 5])
@torch.no_grad()
def test_gates_scale_the_map_or_the_weights(side: int):
    """16 columns: maps of 4 and 9 pixels are gated themselves, of 16 and 25 their weights."""
    x, gates, weight, bias = noise(3, side, side, 24), noise(3, 24).float(), noise(16, 24).float(), noise(16).float()
    want = (x.double() * gates.double()[:, None, None]) @ weight.double().T + bias.double()
    out = x.new_empty(3, side, side, 16)
    GatedWeight(weight, bias, images=3, pixels=side * side).product(x, gates, out)
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


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("type_", ["FP32", "BF16"])
def test_patches_stay_in_their_lines(channels: int, type_: str):
    """Against torch's own, on more threads than cores; what lies behind the last patch is left alone."""
    x = noise(2, channels, 9, 7).float()
    dtype = torch.float32 if type_ == "FP32" else torch.bfloat16
    width, size = 9 * channels + channels % 2, (5, 4)
    out = torch.full((2 * size[0] * size[1] * width + 64,), 7.0, dtype=dtype)
    image, channel, line, cell = (4 * step for step in x.stride())
    op = native.Op(
        kind=native.KINDS["UNFOLD"], out_type=native.TYPES[type_], images=2, lines=size[0], cells=size[1],
        depth=channels, width=width, in_lines=9, in_cells=7, kernel=3, stride=2, padding=1, source=x.data_ptr(),
        source_image=image, source_channel=channel, source_line=line, source_cell=cell, out=out.data_ptr(),
    )  # fmt: skip
    want = F.unfold(x, 3, padding=1, stride=2).unflatten(1, (channels, 9)).permute(0, 3, 2, 1).flatten(2)
    for _ in range(50):
        native.run((native.Op * 1)(op), 5)
        found = out[:-64].view(2, size[0] * size[1], width)
        assert torch.equal(found[..., : 9 * channels].float(), want)
        assert not found[..., 9 * channels :].any(), "what fills a patch up is no zero"
        assert (out[-64:] == 7).all(), "something was written behind the last patch"
