"""Stochastic depth and activation checkpointing: which draws decide what, and that recomputing changes nothing."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from coatnet.layout import unroll
from coatnet.model.layers import StochasticDepth
from coatnet.model.network import CoAtNet
from model.networks import KINDS, assert_equal, config_of, images, network, statistics

WITH_DEPTH = [kind for kind in KINDS if kind != "listing"]  # which has no stochastic depth
DEPTH_KINDS = ["CCTT", "CCCC", "vit_rel", "both kinds in S3", "layer norm"]


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


def draws_of(model: CoAtNet, batch: int = 2, seed: int = 4) -> Tensor:
    return torch.rand(batch, model.num_depth_draws, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("given", [True, False], ids=["draws given", "torch's generator"])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_no_bit(kind: str, given: bool):
    """Loss, gradients, running statistics, their count of batches and the generator's state, over two steps."""
    rate = 0.5 if kind in WITH_DEPTH else 0.0
    plain = network(config_of(kind, stochastic_depth_rate=rate, batch_norm_momentum=0.3), training=True)
    thrifty = copy.deepcopy(plain)
    thrifty.activation_checkpointing = True
    draws = draws_of(plain) if given else None
    ends = []
    for model in (plain, thrifty):
        torch.manual_seed(8)
        losses = []
        for step in range(2):
            loss = model(images(seed=step), draws).square().mean()
            loss.backward()
            losses.append(loss.detach())
        ends.append((torch.stack(losses), gradients(model), statistics(model), torch.get_rng_state()))
    (loss, grads, stats, rng), (loss_again, grads_again, stats_again, rng_again) = ends
    assert torch.equal(loss, loss_again)
    assert_equal(grads_again, grads)
    assert_equal(stats_again, stats)
    assert torch.equal(rng, rng_again)


def test_checkpointing_keeps_fewer_activations():
    """What the graph holds on to between forward and backward is smaller; otherwise the flag did nothing."""
    held = []
    for thrifty in (False, True):
        model = network(training=True)
        model.activation_checkpointing = thrifty
        sizes: list[int] = []

        def pack(saved: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(saved.numel())
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            model(images())
        held.append(sum(sizes))
    assert held[1] < 0.7 * held[0], f"{held[1]} numbers held with checkpointing, {held[0]} without"


def test_checkpointing_restores_the_norms_after_an_error():
    """A backward pass that fails in mid-block leaves momentum and counter as they were."""
    model = network(config_of(batch_norm_momentum=0.3), training=True)
    model.activation_checkpointing = True
    loss = model(images()).sum()
    block = model.s2[0]
    block.shrink.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("in mid-block")))
    with pytest.raises(RuntimeError, match="in mid-block"):
        loss.backward()
    torch.zeros((), requires_grad=True).backward()  # autograd keeps the rest until the next pass, and crashes at exit
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        assert norm.momentum == 0.3
        assert norm.num_batches_tracked is not None
        assert norm.num_batches_tracked.item() == 1


@pytest.mark.parametrize("kind", DEPTH_KINDS)
def test_rate_zero_and_eval_do_nothing(kind: str):
    without = network(config_of(kind, mbconv_norm="layer"), training=True)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    want = without(images())
    assert torch.equal(torch.get_rng_state(), before), "without stochastic depth nothing is to be drawn"
    assert torch.equal(without(images(), torch.zeros(2, without.num_depth_draws)), want)
    evaluated = network(config_of(kind, mbconv_norm="layer", stochastic_depth_rate=0.9))
    found = evaluated(images(), torch.zeros(2, evaluated.num_depth_draws))
    assert torch.equal(found, network(config_of(kind, mbconv_norm="layer"))(images()))


@pytest.mark.parametrize("kind", DEPTH_KINDS)
def test_draws_decide(kind: str):
    """The same draws give the same answer whatever the generator; other draws give another."""
    model = network(config_of(kind, stochastic_depth_rate=0.5), training=True)
    draws, state = draws_of(model), copy.deepcopy(model.state_dict())

    def answer(draws: Tensor | None, seed: int) -> Tensor:
        model.load_state_dict(state)
        torch.manual_seed(seed)
        return model(images(), draws)

    assert torch.equal(answer(draws, 0), answer(draws, 1))
    assert not torch.equal(answer(draws, 0), answer(1 - draws, 0))
    assert torch.equal(answer(None, 2), answer(None, 2))
    assert not torch.equal(answer(None, 2), answer(None, 3))
    torch.manual_seed(2)
    drawn = torch.rand(2, model.num_depth_draws)
    assert torch.equal(answer(None, 2), answer(drawn, 5)), "draws of torch's generator are not those given"


def test_draw_of_one_sample_moves_no_other():
    model = network(config_of("layer norm", stochastic_depth_rate=0.8, depths=(1, 1, 1, 2, 1)), training=True)
    one = draws_of(model)
    other = one.clone()
    other[1] = 1 - other[1]
    found, moved = model(images(), one), model(images(), other)
    assert torch.equal(found[0], moved[0])
    assert not torch.equal(found[1], moved[1])


@pytest.mark.parametrize("column", range(8))
def test_each_branch_follows_its_own_column(column: int):
    """With all other draws at 1, only the branch of this column can drop; the first block never does."""
    model = network(config_of("CCTT", mbconv_norm="layer", stochastic_depth_rate=0.6), training=True)
    assert model.num_depth_draws == 8, "S1 and S2 have one branch each, the three blocks of S3 and S4 two"
    keep = torch.ones(2, 8)
    drop = keep.clone()
    drop[:, column] = 0
    model.s0[1].momentum = 0.0
    moved = not torch.equal(model(images(), keep), model(images(), drop))
    assert moved == (column > 0), f"column {column}"


def test_expectation_is_kept():
    drop = StochasticDepth(0.3).train()
    draws = (torch.arange(10) + 0.5) / 10
    out = drop(torch.ones(10, 2, 3, 3, dtype=torch.float64), draws)
    assert out.mean().item() == pytest.approx(1)
    assert out[:3].abs().max() == 0
    torch.testing.assert_close(out[3:], torch.full((7, 2, 3, 3), 1 / 0.7, dtype=torch.float64))


@pytest.mark.parametrize("kind", WITH_DEPTH)
def test_rates_grow_linearly_with_depth(kind: str):
    config = config_of(kind, stochastic_depth_rate=0.6)
    rates = [spec.drop_rate for spec in unroll(config)]
    total = len(rates)
    assert rates == pytest.approx([0.6 * block / total for block in range(total)])
    built = [module.drop_rate for module in CoAtNet(config).modules() if isinstance(module, StochasticDepth)]
    assert built == rates


def test_momentum_is_the_share_of_the_newest_batch():
    model = network(config_of(batch_norm_momentum=0.25), training=True)
    norm, old = model.s0[1], model.s0[1].running_mean.clone()
    with torch.no_grad():
        batch_mean = model.s0[0](images()).mean(dim=(0, 2, 3))
        model(images())
    torch.testing.assert_close(norm.running_mean, 0.75 * old + 0.25 * batch_mean)


def test_post_and_pre_are_the_same_without_a_table():
    """Both forms of Eq. 3 meet where the table is zero, and only there."""
    pre, post = network(config_of()), network(config_of("post"))
    assert not torch.allclose(pre(images()), post(images()), atol=1e-3)
    with torch.no_grad():
        for model in (pre, post):
            for name, value in model.named_parameters():
                if name.endswith("table"):
                    value.zero_()
    torch.testing.assert_close(pre(images()), post(images()))
    none = CoAtNet(replace(pre.config, relative_attention="none")).eval()
    none.load_state_dict({k: v for k, v in pre.state_dict().items() if not k.endswith("table")})
    torch.testing.assert_close(none(images()), pre(images()))
