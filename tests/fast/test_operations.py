"""Functions that write their operations down once: with other memory, sizes and threads, and what they refuse."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coatnet import native
from coatnet.fast.kernels import Weight, scaled
from coatnet.fast.operations import _OURS, recorded

pytestmark = pytest.mark.skipif(native.missing("bf16") is not None, reason=f"{native.missing('bf16')}")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


@recorded
def two_layers(
    x: Tensor, first: Tensor, second: Tensor, past: Tensor | None, *, twice: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the result, every other row of what lies between, and `past` itself."""
    kept = torch.empty(len(x), first.shape[1], dtype=torch.bfloat16)
    Weight(first).product(x, out=kept)
    between = torch.empty_like(kept)
    Weight(first).product(x, out=between)
    out = Weight(second).product(between, residual=past)
    if twice:
        out = Weight(second).product(between, residual=out)
    return out, kept[::2], past


def expected(x: Tensor, first: Tensor, second: Tensor, past: Tensor | None, *, twice: bool) -> Tensor:
    between = Weight(first).product(x)
    out = Weight(second).product(between, residual=past)
    return Weight(second).product(between, residual=out) if twice else out


@given(rows=st.integers(1, 40), half_width=st.integers(1, 35), given_past=st.booleans(), twice=st.booleans())
@settings(max_examples=40, deadline=None)
def test_any_memory_size_and_option(rows: int, half_width: int, given_past: bool, twice: bool):
    for seed in range(3):  # the first call writes down; the others have other memory
        x, past = noise(rows, 24, seed=seed), noise(rows, 16, seed=seed + 9) if given_past else None
        first, second = (
            noise(24, 2 * half_width, seed=seed + 3).float(),
            noise(2 * half_width, 16, seed=seed + 6).float(),
        )
        out, halves, returned = two_layers(x, first, second, past, twice=twice)
        assert torch.equal(out, expected(x, first, second, past, twice=twice)), f"call {seed}"
        assert torch.equal(halves, Weight(first).product(x)[::2]), f"what lies between, call {seed}"
        assert returned is past


def test_what_was_returned_stays():
    x, first, second = noise(9, 24), noise(24, 8).float(), noise(8, 16).float()
    out, halves, _ = two_layers(x, first, second, None, twice=False)
    before = out.clone(), halves.clone()
    two_layers(x + 1, first, second, None, twice=False)
    assert torch.equal(out, before[0])
    assert torch.equal(halves, before[1])


def test_another_layout_is_another_recording():
    """A weight that lies by columns is read as such, where the one before lay by rows."""
    x, second = noise(9, 24), noise(8, 16).float()
    for first in (noise(24, 8).float(), noise(8, 24).float().T):
        out, _, _ = two_layers(x, first, second, None, twice=False)
        assert torch.equal(out, expected(x, first, second, None, twice=False))


def test_threads_do_not_meet():
    def go(seed: int) -> bool:
        x, first, second = noise(64, 24, seed=seed), noise(24, 40, seed=seed).float(), noise(40, 16, seed=seed).float()
        want = expected(x, first, second, None, twice=True)
        return all(torch.equal(two_layers(x, first, second, None, twice=True)[0], want) for _ in range(50))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(go, range(8)))


def test_what_torch_would_compute_is_refused():
    @recorded
    def computes(x: Tensor) -> tuple[Tensor]:
        return (scaled(x + x, torch.empty(len(x))),)

    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"takes views: not aten\.add"):
            computes(noise(2, 3, 4, 8))
    x, first, second = noise(9, 24), noise(24, 8).float(), noise(8, 16).float()  # what broke off left nothing behind
    assert torch.equal(
        two_layers(x, first, second, None, twice=False)[0], expected(x, first, second, None, twice=False)
    )


def test_memory_of_no_given_dtype_is_refused():
    @recorded
    def asks(x: Tensor) -> tuple[Tensor]:
        return (Weight(torch.empty(24, 16)).product(x),)

    with pytest.raises(RuntimeError, match="of a given dtype"):
        asks(noise(3, 24))


def test_a_recorded_function_in_another_is_refused():
    @recorded
    def outer(x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor]:
        return (two_layers(x, first, second, None, twice=False)[0],)

    with pytest.raises(AssertionError, match="two_layers is called in"):
        outer(noise(9, 24), noise(24, 8).float(), noise(8, 16).float())


def test_memory_is_used_again_by_what_comes_later():
    """Of the maps between many layers two are there at a time, whatever else a thread did before."""

    @recorded
    def layers(x: Tensor, weight: Tensor, *, count: int) -> tuple[Tensor]:
        out = x
        for _ in range(count):
            out = Weight(weight).product(out, residual=x)
        return (out,)

    def arena_of(count: int) -> int:
        (found,) = layers(x, weight, count=count)
        want = x
        for _ in range(count):
            want = Weight(weight).product(want, residual=x)
        assert torch.equal(found, want)
        return _OURS.arena.nbytes

    x, weight = noise(300, 64), noise(64, 64).float() / 8
    with ThreadPoolExecutor(1) as pool:  # a thread that has no arena yet
        few, many = pool.submit(arena_of, 3).result(), pool.submit(arena_of, 12).result()
    assert many == few <= 2 * x.nbytes + weight.nbytes, f"{few} and {many} bytes"


def test_a_tensor_that_is_no_argument_is_refused():
    weight = noise(24, 16).float()

    @recorded
    def closes_over(x: Tensor) -> tuple[Tensor]:
        return (Weight(weight).product(x),)

    with pytest.raises(AssertionError, match="as arguments"):
        closes_over(noise(3, 24))


def test_each_call_carries_every_operation_out_once():
    @recorded
    def add(x: Tensor, weight: Tensor, total: Tensor) -> tuple[Tensor]:
        Weight(weight).product(x, out=total, residual=total)
        return (total,)

    x, weight, total = noise(9, 24), noise(24, 16).float(), torch.zeros(9, 16, dtype=torch.bfloat16)
    want = total
    for _ in range(3):
        want = Weight(weight).product(x, residual=want)
        (found,) = add(x, weight, total)
        assert found is total, "what was given and changed is returned itself"
        assert torch.equal(total, want)
