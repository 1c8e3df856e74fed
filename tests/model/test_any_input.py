"""Any size from 1 x 1 px, any batch, several sizes in one call."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from coatnet.errors import ConfigError
from coatnet.model.attention import RelativeBias
from model.networks import BASE, KINDS, assert_equal, config_of, images, network, statistics, want_shapes

SIDES = st.integers(1, 70)
NETWORKS = {kind: network(config_of(kind)) for kind in KINDS}
ROUNDING = 1e-5  # of fp32, where one batch is computed in parts


@settings(max_examples=150, deadline=None, derandomize=True)
@given(kind=st.sampled_from(list(KINDS)), height=SIDES, width=SIDES, batch=st.integers(0, 3))
@torch.no_grad()
def test_any_size_gives_finite_logits_and_ceil_grids(kind: str, height: int, width: int, batch: int):
    model, size = NETWORKS[kind], (height, width)
    x = images(batch, size)
    maps = model.forward_intermediates(x)
    assert [tuple(found.shape) for found in maps] == want_shapes(model.config, batch, size)
    logits = model(x)
    assert logits.shape == (batch, BASE.num_classes)
    assert logits.isfinite().all()
    assert torch.equal(logits, model.forward_head(maps[-1]))
    assert torch.equal(model.forward_features(x), maps[-1])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(kind=st.sampled_from(list(KINDS)), height=SIDES, width=SIDES)
def test_any_size_trains(kind: str, height: int, width: int):
    model = copy.deepcopy(NETWORKS[kind]).train()
    loss = model(images(2, (height, width))).square().sum()
    loss.backward()
    assert loss.isfinite()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert parameter.grad.isfinite().all(), f"{name} has a gradient that is not finite"


@settings(max_examples=40, deadline=None, derandomize=True)
@given(kind=st.sampled_from(list(KINDS)), height=SIDES, width=SIDES)
@torch.no_grad()
def test_batch_of_one_is_itself_in_a_batch(kind: str, height: int, width: int):
    x = images(3, (height, width))
    together, alone = NETWORKS[kind](x), NETWORKS[kind](x[1:2])
    torch.testing.assert_close(alone, together[1:2], rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", ["CCTT", "vit_rel", "windows", "layer norm"])
def test_list_is_separate_calls_in_order(kind: str, training: bool):
    """Two crop sizes through one network in one call; in training BatchNorm sees each tensor apart."""
    crops = [images(2, size, seed=number) for number, size in enumerate([(64, 64), (32, 48), (27, 27), (64, 64)])]
    one = network(config_of(kind, stochastic_depth_rate=0.5, batch_norm_momentum=0.3), training=training)
    other = copy.deepcopy(one)
    torch.manual_seed(5)
    found = one(crops)
    torch.manual_seed(5)
    want = [other(crop) for crop in crops]
    assert isinstance(found, list)
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    assert_equal(statistics(one), statistics(other))
    moved = any(not torch.equal(value, one.get_buffer(name)) for name, value in statistics(network(one.config)).items())
    has_batch_norm = kind in ("CCTT", "windows", "layer norm")
    assert moved == (training and has_batch_norm)


def test_empty_list_gives_an_empty_list():
    assert network()([]) == []


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_trained_size_is_bit_equal_after_other_sizes(kind: str):
    model = NETWORKS[kind]
    before = model(images())
    for size in [(1, 1), (64, 96), (33, 48), (32, 47), (16, 24)]:
        model(images(1, size))
    assert torch.equal(model(images()), before)


@pytest.mark.parametrize("grid", [(1, 1), (3, 3), (4, 9), (14, 14), (28, 20)])
def test_interpolated_table_keeps_its_centre(grid: tuple[int, int]):
    bias = RelativeBias(2, (4, 9)).double()
    torch.nn.init.normal_(bias.table)
    N = grid[0] * grid[1]
    laid_out = bias(grid)
    assert laid_out.shape == (2, N, N)
    for head in (0, 1):
        centre = bias.table[head, 3, 8].expand(N)
        torch.testing.assert_close(laid_out[head].diagonal(), centre, rtol=0, atol=1e-12)


@pytest.mark.parametrize("grid", [(1, 1), (3, 3), (4, 9), (14, 14), (5, 2)])
def test_symmetric_table_stays_symmetric(grid: tuple[int, int]):
    """A table with P[d] = P[-d] weighs i for j as j for i, on any grid."""
    bias = RelativeBias(2, (4, 9)).double()
    torch.nn.init.normal_(bias.table)
    with torch.no_grad():
        bias.table += bias.table.flip(1, 2)
    laid_out = bias(grid)
    torch.testing.assert_close(laid_out, laid_out.transpose(1, 2), rtol=0, atol=1e-12)


def test_larger_input_meets_the_interpolated_table():
    """Not the trained table cut off or wrapped round: the network on a larger grid is the one built for that grid
    with its table interpolated beforehand."""
    small = network(config_of("CTTT", image_size=(32, 48)))
    large = network(config_of("CTTT", image_size=(64, 80)))
    state = small.state_dict()
    for name, table in large.state_dict().items():
        if name.endswith("table"):
            state[name] = F.interpolate(state[name][None], size=table.shape[1:], mode="bilinear")[0]
    large.load_state_dict(state)
    x = images(2, (64, 80))
    torch.testing.assert_close(small(x), large(x), rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("kind", ["CCTT", "vit_rel"])
def test_any_number_of_channels_and_classes(kind: str, channels: int):
    model = network(config_of(kind, in_channels=channels, num_classes=2))
    assert model(images(2, channels=channels)).shape == (2, 2)
    with pytest.raises(ConfigError, match=rf"\(2, 3, 32, 48\).*\(B, {channels}, H, W\)"):
        model(images(2, channels=3))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.zeros(3, 32, 32), r"Images came as \(3, 32, 32\)\. Give \(B, 3, H, W\)"),
        (torch.zeros(2, 32, 32, 3), r"Images came as \(2, 32, 32, 3\)"),
        (torch.zeros(2, 3, 0, 32), r"Images came as \(2, 3, 0, 32\).*1 or more"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), r"Images came as torch\.uint8\. Give floats"),
        ([torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 8, 8)], r"Images came as \(2, 1, 8, 8\)"),
    ],
)
def test_wrong_images_are_refused(wrong: torch.Tensor, message: str):
    with pytest.raises(ConfigError, match=message):
        NETWORKS["CCTT"](wrong)


def test_wrong_draws_are_refused():
    model = network(config_of(stochastic_depth_rate=0.5), training=True)
    with pytest.raises(ConfigError, match=r"draws came as \(2, 3\)\. Give \(B, num_depth_draws\), \(2, 8\)"):
        model(images(), torch.rand(2, 3))
    with pytest.raises(ConfigError, match="Give each tensor its own call"):
        model([images()], torch.rand(2, 8))


@torch.no_grad()
def test_channels_last_gives_the_same_answers():
    model, x = network(), images()
    want = model(x)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    for found in (model(x.to(memory_format=torch.channels_last)), last(x.to(memory_format=torch.channels_last))):
        torch.testing.assert_close(found, want, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_half_precision_by_autocast_and_by_cast(kind: str):
    model, x = NETWORKS[kind], images()
    want = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast_along = model(x)
    cast_before = copy.deepcopy(model).bfloat16()(x.bfloat16())
    for found in (cast_along, cast_before):
        assert found.dtype == torch.bfloat16
        assert (found - want).abs().max() < 0.1 * want.std() + 0.1
