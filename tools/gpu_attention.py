"""Attention alone on a card, in every way that torch has, in turns: which one is fastest with a learned bias?

`gpu_session.py` runs it. Each way is compiled and gives the same gradients, the bias table's included.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from coatnet.bench.turns import ratio, take_turns
from coatnet.fast.flex_attention import attend
from coatnet.fast.training import CUDA_OPTIONS
from coatnet.model.attention import Attention, RelativeBias

# Images, heads and grid: S3 of coatnet_0 at 224 px and of coatnet_2 at 384 px.
SHAPES = ((128, 12, (14, 14)), (24, 16, (24, 24)))
HEAD_DIM = 32
OURS = "flex, by offset"
NUM_QUEUED = 10  # calls that the card is given at once
TURN_S = 0.5
Way = Callable[[Tensor, Tensor, Tensor, RelativeBias, tuple[int, int]], Tensor]


def readable(q: Tensor, k: Tensor, v: Tensor, bias: RelativeBias, grid: tuple[int, int]) -> Tensor:
    """As `Attention.mix` writes it."""
    logits = (q * HEAD_DIM**-0.5) @ k.transpose(-2, -1) + bias(grid)
    return logits.softmax(dim=-1, dtype=torch.float32).to(q.dtype) @ v


def scaled_dot_product(q: Tensor, k: Tensor, v: Tensor, bias: RelativeBias, grid: tuple[int, int]) -> Tensor:
    """As timm calls it."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias(grid).to(q.dtype)[None])


def by_offset(q: Tensor, k: Tensor, v: Tensor, bias: RelativeBias, grid: tuple[int, int]) -> Tensor:
    """As `coatnet.fast` computes it."""
    return attend(q, k, v, bias.table, grid)


def laid_out(q: Tensor, k: Tensor, v: Tensor, bias: RelativeBias, grid: tuple[int, int]) -> Tensor:
    """FlexAttention that reads the bias of each pair of tokens."""
    from torch.nn.attention.flex_attention import flex_attention

    bias_MNN = bias(grid)

    def biased(score: Tensor, _image: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + bias_MNN[head, query, key]

    return flex_attention(q, k, v, score_mod=biased, kernel_options={"BACKEND": "TRITON"})


WAYS: dict[str, Way] = {
    OURS: by_offset, "flex, laid out": laid_out, "SDPA": scaled_dot_product, "readable": readable,
}  # fmt: skip


def compare(device: torch.device, rounds: int) -> list[dict[str, Any]]:
    """Time forward, and forward with backward, of each shape; a way that fails is left out and told of."""
    return [
        _row(images, heads, grid, with_gradients, device, rounds)
        for images, heads, grid in SHAPES
        for with_gradients in (True, False)
    ]


def _row(
    images: int, heads: int, grid: tuple[int, int], with_gradients: bool, device: torch.device, rounds: int
) -> dict[str, Any]:
    torch.manual_seed(0)
    width = heads * HEAD_DIM
    layer = Attention(width, width, HEAD_DIM, grid, "pre").to(device)
    assert layer.weigh.bias is not None
    torch.nn.init.normal_(layer.weigh.bias.table)
    x = torch.randn(images, grid[0] * grid[1], width, device=device)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        parts = [head.detach() for head in layer.heads(x)]
    calls: dict[str, Callable[[], object]] = {}
    for name, way in WAYS.items():
        call = _call(way, parts, layer.weigh.bias, grid, with_gradients)
        try:
            call()
        except Exception as error:  # of whatever kind: the other ways are still to be measured
            print(f"{name}: {type(error).__name__}: {str(error)[:300]}")
            continue
        calls[name] = call
    start = time.perf_counter()
    timings = take_turns(calls, rounds=rounds, turn_s=TURN_S)
    others = [name for name in timings if name != OURS]
    best = min(others, key=lambda name: timings[name].median_s) if others and OURS in timings else None
    return {
        "work": "attention bf16, " + ("forward and backward" if with_gradients else "forward"), "batch": images,
        "heads": heads, "image_size": list(grid), "device": device.type,
        "images_per_s": {name: NUM_QUEUED * images / timing.median_s for name, timing in timings.items()},
        "timings": {name: timing.to_dict() for name, timing in timings.items()}, "best_peer": best,
        "ratio": asdict(ratio(timings[OURS], timings[best])) if best else None,
        "seconds": time.perf_counter() - start,
    }  # fmt: skip


def _call(
    way: Way, parts: list[Tensor], bias: RelativeBias, grid: tuple[int, int], with_gradients: bool
) -> Callable[[], object]:
    """Return several calls in a row as one, with the wait for the card at the end."""
    compiled = torch.compile(way, dynamic=False, fullgraph=True, options=CUDA_OPTIONS)
    given = [part.clone().requires_grad_(with_gradients) for part in parts]
    slope = torch.randn_like(given[0])

    def call() -> None:
        with torch.set_grad_enabled(with_gradients):
            for _ in range(NUM_QUEUED):
                out = compiled(*given, bias, grid)
                if with_gradients:
                    torch.autograd.grad(out, [*given, bias.table], slope)
        if out.is_cuda:
            torch.cuda.synchronize()

    return call
