"""FlexAttention with the learned bias against the readable attention: answers and gradients, the table's included.

On a processor torch computes it unfused, as a reference, and refuses to give gradients although its formulas hold
there; the tests lift that refusal. `test_cuda.py` holds the compiled kernel to the same.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import flex_attention as torchs

from coatnet.fast.flex_attention import FlexAttention, attend, use_flex_attention
from coatnet.fast.training import for_training
from coatnet.model.attention import Attention, WindowAttention, join_heads
from model.networks import config_of, images, network

ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-5}
GRIDS = [(7, 7), (14, 14), (5, 9), (1, 1)]


@pytest.fixture(autouse=True)
def _processors_allowed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torchs, "_validate_device", lambda *_tensors: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", (UserWarning, DeprecationWarning))  # of being unfused, and torch's own
        yield
    torch.compiler.reset()


def attention_of(head_dim: int, trained: tuple[int, int], relative: str = "pre", num_heads: int = 2) -> Attention:
    layer = Attention(num_heads * head_dim, num_heads * head_dim, head_dim, trained, relative)
    if layer.weigh.bias is not None:
        torch.nn.init.normal_(layer.weigh.bias.table)
    return layer


def heads_of(layer: Attention, grid: tuple[int, int], dtype: torch.dtype, batch: int = 2) -> list[Tensor]:
    """Return q, k and v, (B, M, N, D) as the projection lays them out in memory."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(batch, math.prod(grid), layer.qkv.in_features, generator=rng).to(dtype)
    return [head.detach().requires_grad_() for head in layer.heads(x)]


def with_gradients(mix: Callable[..., Tensor], parts: list[Tensor]) -> list[Tensor]:
    """Return what comes out and the gradients of what went in, for one random weighing of the outputs."""
    out = mix(*parts)
    slope = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, parts, slope)]


def check(layer: Attention, grid: tuple[int, int], dtype: torch.dtype, *, compiled: bool = False) -> None:
    layer = layer.to(dtype)
    parts = heads_of(layer, grid, dtype)
    if layer.weigh.bias is not None:
        parts.append(layer.weigh.bias.table)

    def flexible(q: Tensor, k: Tensor, v: Tensor, table: Tensor | None = None) -> Tensor:
        return join_heads(attend(q, k, v, table, grid))

    mix = torch.compile(flexible, backend="aot_eager", fullgraph=True, dynamic=False) if compiled else flexible
    found, want = with_gradients(mix, parts), with_gradients(lambda q, k, v, *_: layer.mix(q, k, v, grid), parts)
    for name, a, b in zip(("out", "q", "k", "v", "table"), found, want, strict=False):
        error = (a - b).abs().max() / b.abs().max().clamp(min=1)
        assert error <= ROUNDING[dtype], f"{grid} {dtype}: {name} differs by {error:.1e} of its largest"


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("grid", GRIDS)
def test_answers_and_gradients_are_the_readable_ones(grid: tuple[int, int], dtype: torch.dtype):
    check(attention_of(32, grid), grid, dtype)


@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("relative", ["pre", "none"])
def test_every_head_size_with_and_without_bias(head_dim: int, relative: str):
    check(attention_of(head_dim, (6, 7), relative), (6, 7), torch.float64)


def test_a_table_of_another_grid_is_interpolated():
    check(attention_of(32, (7, 7)), (12, 10), torch.float64)


@pytest.mark.slow
@settings(max_examples=30, deadline=None, derandomize=True)
@given(height=st.integers(1, 12), width=st.integers(1, 12), trained=st.integers(1, 9), heads=st.integers(1, 3))
def test_any_grid(height: int, width: int, trained: int, heads: int):
    torch.compiler.reset()  # torch traces each anew, and would give up after eight
    check(attention_of(32, (trained, trained), num_heads=heads), (height, width), torch.float64)


@pytest.mark.parametrize("grid", [(7, 7), (5, 9)])
def test_traced_with_its_backward_pass_it_agrees(grid: tuple[int, int]):
    """What the compiler sees, both ways, is captured whole."""
    check(attention_of(32, grid), grid, torch.float32, compiled=True)


@pytest.mark.slow
def test_thousand_tokens():
    check(attention_of(32, (32, 33)), (32, 33), torch.float64)


def flexible_network(kind: str = "CCTT"):
    return network(config_of(kind, head_dim=32, widths=(4, 32, 32, 64, 64)))


def test_only_attention_that_fits_is_given_the_class():
    for kind, fits in (("CCTT", True), ("none", True), ("post", False), ("windows", False), ("linear", False)):
        found = {type(m) for m in use_flex_attention(flexible_network(kind)).modules() if isinstance(m, Attention)}
        assert (found == {FlexAttention}) == fits, f"{kind}: {found}"
    small_heads = use_flex_attention(network(config_of(head_dim=8)))
    assert not any(isinstance(m, FlexAttention) for m in small_heads.modules())
    assert WindowAttention.__mro__[1] is Attention, "a window's attention is an Attention, and not to be taken for one"


@pytest.mark.parametrize("kind", ["CCTT", "vit_rel", "post", "none", "windows"])
def test_weights_names_and_answers_stay(kind: str):
    model = flexible_network(kind) if kind != "vit_rel" else network(config_of(kind))
    swapped = use_flex_attention(copy.deepcopy(model))
    before, after = model.state_dict(), swapped.state_dict()
    assert list(before) == list(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    x = images(2)
    assert torch.equal(swapped(x), model(x)), "on a processor the readable attention computes"


def test_on_a_processor_training_does_not_take_it():
    compiled = for_training(flexible_network(), compiled=True)
    assert not any(isinstance(module, FlexAttention) for module in compiled.modules())
