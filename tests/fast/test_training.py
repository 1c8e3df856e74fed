"""The fused blocks of training against the readable ones: the same updates, errors no larger, less memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from coatnet import native
from coatnet.fast.engines import optimize, optimize_at_once
from coatnet.fast.training import for_training
from coatnet.model.mbconv import MBConv
from coatnet.model.network import CoAtNet
from model.networks import config_of, images, network

pytestmark = pytest.mark.skipif(native.missing("bf16") is not None, reason=f"{native.missing('bf16')}")
FUSED = (
    "CCTT", "CCCC", "TTTT", "both kinds in S3", "few strides", "post", "heads of 32", "heads of 32, no bias", "listing",
)  # fmt: skip
SIZE = (48, 64)


def pass_through(
    model: CoAtNet, x: Tensor, *, bf16: bool = True, draws: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Return logits, gradients and statistics after one training pass."""
    model.train().zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(x, draws)
    F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), torch.arange(len(x)) % 5).backward()
    gradients = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach().double(), gradients, {name: b.double() for name, b in model.named_buffers()}


def fused_of(model: CoAtNet) -> CoAtNet:
    fused = for_training(copy.deepcopy(model))
    kinds = {type(module).__name__ for module in fused.modules()}
    assert kinds & {"_FusedMBConv", "_FusedTransformer", "_FusedFeedForward"}, "nothing was fused"
    return fused


def error_of(found: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Return the root mean square over the tensors of each one's error, as a share of its size, at most 1.

    What errs by more than its size is lost, as BatchNorm over two nearly equal pixels loses it: how far does not count.
    """
    shares = [((found[k] - want[k]).square().mean() / want[k].square().mean().clamp(min=1e-6)).item() for k in want]
    shares = [min(share, 1.0) for share in shares]
    return (sum(shares) / len(shares)) ** 0.5


@pytest.mark.parametrize("kind", FUSED)
def test_gradients_err_no_more_than_the_plain_ones(kind: str):
    errors: dict[str, list[float]] = {"fused": [], "plain": []}
    for seed in range(6):
        model, x = network(config_of(kind), seed=seed, training=True), images(4, SIZE, seed=seed)
        logits, want, statistics = pass_through(copy.deepcopy(model).double(), x.double(), bf16=False)
        for name, form in (("fused", fused_of(model)), ("plain", copy.deepcopy(model))):
            found_logits, found, found_statistics = pass_through(form, x)
            errors[name].append(error_of({**found, "logits": found_logits}, {**want, "logits": logits}))
            assert error_of(found_statistics, statistics) < 0.02, f"{name} moves BatchNorm's statistics elsewhere"
    fused, plain = (sum(errors[name]) / 6 for name in ("fused", "plain"))
    assert fused <= 1.5 * plain, f"{kind}: fused errs by {fused:.2%}, plain by {plain:.2%}"


@pytest.mark.parametrize("kind", ["CCTT", "heads of 32"])
def test_dropped_branches_err_no_more_than_the_plain_ones(kind: str):
    """The same images lose the same branches; what goes past them stays."""
    errors = {"fused": 0.0, "plain": 0.0}
    for seed in range(6):
        model = network(config_of(kind, stochastic_depth_rate=0.7), seed=seed, training=True)
        x = images(4, SIZE, seed=seed)
        draws = torch.rand(4, model.num_depth_draws, generator=torch.Generator().manual_seed(seed))
        logits, want, _ = pass_through(copy.deepcopy(model).double(), x.double(), bf16=False, draws=draws)
        for name, form in (("fused", fused_of(model)), ("plain", copy.deepcopy(model))):
            found_logits, found, _ = pass_through(form, x, draws=draws)
            errors[name] += error_of({**found, "logits": found_logits}, {**want, "logits": logits}) / 6
    assert errors["fused"] <= 1.5 * errors["plain"], f"fused errs by {errors['fused']:.2%}, plain {errors['plain']:.2%}"


def test_same_result_twice():
    model, x = network(config_of(), training=True), images(4, SIZE)
    _, first, _ = pass_through(fused_of(model), x)
    _, again, _ = pass_through(fused_of(model), x)
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("kind", ["CCCC", "heads of 32"])
def test_the_kernels_sums_depend_on_no_number_of_threads(kind: str):
    """All gradients but the head's norm, which is torch's."""
    model, x = network(config_of(kind), training=True), images(4, SIZE)
    before, found = torch.get_num_threads(), dict[int, dict[str, Tensor]]()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found[threads] = pass_through(fused_of(model), x)[1]
    finally:
        torch.set_num_threads(before)
    for name in found[1]:
        if not name.startswith("norm."):
            same = [torch.equal(found[1][name], found[threads][name]) for threads in (2, 5)]
            assert all(same), f"the gradient of {name} has other bits on more threads"


@settings(max_examples=25, deadline=None, derandomize=True)
@given(kind=st.sampled_from(FUSED), height=st.integers(8, 70), width=st.integers(8, 70), batch=st.integers(2, 5))
def test_any_size_and_batch(kind: str, height: int, width: int, batch: int):
    """On uneven maps and few of them, gradients stay as near to the truth as the plain ones.

    Over three networks: where rounding turns the order of two pixels around, pooling sends a gradient elsewhere.
    """
    errors = [0.0, 0.0]
    for seed in range(3):
        model, x = network(config_of(kind), seed=seed, training=True), images(batch, (height, width), seed=seed)
        logits, want, _ = pass_through(copy.deepcopy(model).double(), x.double(), bf16=False)
        for number, form in enumerate((fused_of(model), copy.deepcopy(model))):
            found_logits, found, _ = pass_through(form, x)
            errors[number] += error_of({**found, "logits": found_logits}, {**want, "logits": logits}) / 3
    assert errors[0] <= 3 * errors[1] + 0.02, f"fused errs by {errors[0]:.1%}, plain by {errors[1]:.1%}"


def test_without_bf16_it_is_the_plain_network():
    model, x = network(config_of(), training=True), images(4, SIZE)
    logits, want, _ = pass_through(copy.deepcopy(model), x, bf16=False)
    found_logits, found, _ = pass_through(fused_of(model), x, bf16=False)
    assert torch.equal(found_logits, logits)
    assert all(torch.equal(found[name], want[name]) for name in want)


def test_gradients_of_gradients_are_refused():
    """The kernels know the first alone: better an error than a wrong penalty."""
    fused = fused_of(network(config_of("CCTT"))).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = fused(images(2, (32, 32))).float().square().sum()
    slopes = torch.autograd.grad(loss, list(fused.parameters()), create_graph=True, allow_unused=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.stack([slope.square().sum() for slope in slopes if slope is not None]).sum().backward()


def average_all(norm: nn.BatchNorm2d) -> None:
    norm.momentum = None


def track_nothing(norm: nn.BatchNorm2d) -> None:
    norm.running_mean = norm.running_var = norm.num_batches_tracked = None


@pytest.mark.parametrize("change", [nn.BatchNorm2d.eval, average_all, track_nothing])
def test_statistics_of_another_kind_take_the_plain_block(change: Callable[[nn.BatchNorm2d], object]):
    def changed(model: CoAtNet) -> CoAtNet:
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                change(module)
        model.train = lambda mode=True: model  # pyright: ignore  # noqa: ARG005 - what was changed stays so
        return model

    model, x = network(config_of("CCCC"), training=True), images(4, SIZE)
    _, want, want_after = pass_through(changed(copy.deepcopy(model)), x)
    _, found, after = pass_through(changed(fused_of(model)), x)
    assert all(torch.equal(found[name], want[name]) for name in want)
    assert all(torch.equal(after[name], want_after[name]) for name in want_after)


def test_another_default_dtype_changes_nothing():
    model, x = fused_of(network(config_of(), training=True)), images(4, SIZE)
    first = copy.deepcopy(model)
    _, want, _ = pass_through(first, x)
    torch.set_default_dtype(torch.float64)
    try:
        _, found, _ = pass_through(model, x)
    finally:
        torch.set_default_dtype(torch.float32)
    apart = [name for name in want if not torch.equal(found[name], want[name])]
    assert not apart, f"{len(apart)} gradients differ: {apart[:3]}"


def test_frozen_weights_leave_the_other_gradients_as_they_are():
    model, x = fused_of(network(config_of(), training=True)), images(4, SIZE)
    _, want, _ = pass_through(copy.deepcopy(model), x)
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 3 > 0)
    _, found, _ = pass_through(model, x)
    assert len(found) < len(want)
    assert all(torch.equal(found[name], want[name]) for name in found)


def test_depthwise_stride_and_layer_norm_stay_plain():
    for kind, is_plain in (
        ("depthwise stride", lambda block: block.depthwise.stride[0] == 2),
        ("layer norm", lambda _block: True),
    ):
        blocks = [module for module in for_training(network(config_of(kind))).modules() if isinstance(module, MBConv)]
        assert any(map(is_plain, blocks)), kind
        for block in blocks:
            assert (type(block) is MBConv) == is_plain(block), f"{kind}: {block}"


@pytest.mark.parametrize("kind", ["CCTT", "heads of 32"])
def test_checkpointed_activations_give_the_same_gradients_and_statistics(kind: str):
    model, x = network(config_of(kind), training=True), images(4, SIZE)
    _, want, statistics = pass_through(fused_of(model), x)
    checkpointed = fused_of(model)
    checkpointed.activation_checkpointing = True
    _, found, found_statistics = pass_through(checkpointed, x)
    assert all(torch.equal(found[name], want[name]) for name in want)
    assert all(torch.equal(found_statistics[name], statistics[name]) for name in statistics)


def test_a_block_with_a_hook_is_called_and_changes_no_bit():
    model, x = network(config_of("heads of 32"), training=True), images(4, SIZE)
    logits, want, _ = pass_through(fused_of(model), x)
    hooked, seen = fused_of(model), []
    for stage in hooked.stages[1:4]:
        list(stage.children())[-1].register_forward_hook(lambda *_: seen.append(1))
    replaced: Any = next(hooked.stages[4].children())
    replaced.forward = lambda *given, forward=replaced.forward: (seen.append(1), forward(*given))[1]
    found_logits, found, _ = pass_through(hooked, x)
    assert len(seen) == 4
    assert torch.equal(found_logits, logits)
    assert all(torch.equal(found[name], want[name]) for name in want)


@pytest.mark.parametrize("kind", ["CCTT", "windows", "linear"])
def test_a_fused_network_is_optimized_like_any_other(kind: str):
    model, x = network(config_of(kind)).eval(), images(3, SIZE)
    fused = for_training(copy.deepcopy(model))
    for precision in ("fp32", "bf16"):
        want = optimize_at_once(model, precision=precision)(x)
        assert torch.equal(optimize_at_once(fused, precision=precision)(x), want), precision
    if kind == "CCTT":
        assert torch.equal(
            optimize(fused, precision="int8", calibration=x)(x), optimize(model, precision="int8", calibration=x)(x)
        )


def test_a_stage_without_blocks_is_passed_by():
    model, x = network(config_of("vit_rel", depths=(2,)), training=True), images(2, SIZE)
    fused_logits, _, _ = pass_through(fused_of(model), x)
    logits, _, _ = pass_through(copy.deepcopy(model), x)
    assert (fused_logits - logits).abs().max() < 0.05, "two layers in bf16"


def test_one_image_whose_last_map_is_one_pixel():
    model, x = network(config_of("heads of 32"), training=True), images(1, (32, 32))
    poison = [torch.full((1 << 18,), 7.0) for _ in range(64)]  # what memory holds that nobody wrote to
    del poison
    _, found, _ = pass_through(fused_of(model), x)
    _, want, _ = pass_through(copy.deepcopy(model).double(), x.double(), bf16=False)
    name = "s4.0.ffn.0.weight"
    assert error_of({name: found[name]}, {name: want[name]}) < 0.1


def test_names_weights_and_answers_stay():
    model, x = network(config_of()), images(3, SIZE)
    fused = for_training(copy.deepcopy(model)).eval()
    assert list(fused.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        assert torch.equal(fused(x), model.eval()(x))
    again: Any = copy.deepcopy(fused)
    assert torch.equal(again(x), fused(x))
