"""What this machine can do: products in each precision, GELU, softmax, depthwise convolution, copying, handing over.

A network cannot be faster than its products alone; the roofline adds the rest of its work at the machine's own rates,
so that what remains is seen to be the program's.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from coatnet import native
from coatnet.config import ModelConfig
from coatnet.layout import EXPANSION, count, unroll

SIDES = {"cpu": 2048, "cuda": 8192}  # of the square products
IMAGES = {"cpu": 16, "cuda": 128}  # of the maps: more than the caches hold
NUM_QUEUED = 10  # calls that a card is given at once, so that starting them is not what is timed
ROWS = 2044  # of our kernels' products: their tiles have 14
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Rates:
    """The machine's rates in one precision, measured in one run; the best of the ways tried."""

    products_gmacs_per_s: float
    products_by: str
    gelu_g_per_s: float  # elements
    softmax_g_per_s: float
    depthwise_gmacs_per_s: float
    copy_gb_per_s: float  # read and written
    round_trip_ns: float | None  # of a cache line between two cores: some hundred ns where they share no cache


@dataclass(frozen=True, kw_only=True)
class Product:
    """One large product of matrices, and who computes it."""

    by: str
    gmacs: float
    call: Callable[[], object]
    operands: tuple[Tensor, ...] = ()  # held for a call that knows their addresses alone


def fastest_product(precision: str, device: torch.device) -> Product:
    """Return the fastest of the ways that this machine has, for so many threads as torch has."""
    ways = [_mm(precision, device)]
    if precision != "int8":
        ways.append(_convolution(precision, device))
    if device.type == "cpu" and native.missing(precision) is None:
        ways.append(_kernel(precision))
    return min(ways, key=lambda product: _best_s(product.call, device) / product.gmacs)


def measure_rates(product: Product, precision: str, device: torch.device) -> Rates:
    """Measure for so many threads as torch has."""
    images = IMAGES.get(device.type, IMAGES["cpu"])
    x = torch.randn(images, 56, 56, 384, device=device, dtype=DTYPES[precision])
    y, logits = torch.empty_like(x), torch.randn(images * 6 * 196, 196, device=device, dtype=DTYPES[precision])
    weight = torch.randn(384, 1, 3, 3, device=device, dtype=x.dtype)
    maps = x.permute(0, 3, 1, 2)
    return Rates(
        products_gmacs_per_s=product.gmacs / _best_s(product.call, device),
        products_by=product.by,
        gelu_g_per_s=x.numel()
        / 1e9
        / min(_best_s(lambda: F.gelu(x), device), _best_s(lambda: F.gelu(x, approximate="tanh"), device)),
        softmax_g_per_s=logits.numel() / 1e9 / _best_s(lambda: logits.softmax(dim=1), device),
        depthwise_gmacs_per_s=9
        * x.numel()
        / 1e9
        / _best_s(lambda: F.conv2d(maps, weight, padding=1, groups=384), device),
        copy_gb_per_s=2 * x.nbytes / 1e9 / _best_s(lambda: y.copy_(x), device),
        round_trip_ns=_round_trip_ns(device),
    )


def _round_trip_ns(device: torch.device) -> float | None:
    """Return the median of some, or None for one thread or off the CPU."""
    if device.type != "cpu" or torch.get_num_threads() == 1:
        return None
    found = [trip_s for trip_s in (native.round_trip_s() for _ in range(5)) if trip_s is not None]
    return 1e9 * statistics.median(found) if found else None


def _best_s(call: Callable[[], object], device: torch.device, repeats: int = 7) -> float:
    """Return the seconds of the fastest call: a limit is what was reached."""
    once = _seconds_on_cuda if device.type == "cuda" else _seconds
    with torch.inference_mode():
        return min(once(call) for _ in range(repeats))


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _seconds_on_cuda(call: Callable[[], object]) -> float:
    """Return the card's own time for one of several calls in a row."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(NUM_QUEUED):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / NUM_QUEUED


def _side(device: torch.device) -> int:
    return SIDES.get(device.type, SIDES["cpu"])


def _mm(precision: str, device: torch.device) -> Product:
    side = _side(device)
    if precision == "int8":
        a = torch.randint(-128, 127, (side, side), dtype=torch.int8, device=device)
        call: Callable[[], Tensor] = lambda: torch._int_mm(a, a)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]  # noqa: E731
    else:
        a = torch.randn(side, side, dtype=DTYPES[precision], device=device)
        call = lambda: a @ a  # noqa: E731
    return Product(by="torch.mm", gmacs=side**3 / 1e9, call=call)


def _convolution(precision: str, device: torch.device) -> Product:
    side = _side(device)
    x = torch.randn(1, side, side // 32, 32, dtype=DTYPES[precision], device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(side, side, 1, 1, dtype=x.dtype, device=device).to(memory_format=torch.channels_last)
    return Product(by="1x1 convolution", gmacs=side**3 / 1e9, call=lambda: F.conv2d(x, weight))


def _kernel(precision: str) -> Product:
    """A product of our own: fp32 and bf16 into themselves, 8 bits into bf16."""
    type_, out_type, size = {"fp32": ("FP32", "FP32", 4), "bf16": ("BF16", "BF16", 2), "int8": ("UINT8", "BF16", 1)}[
        precision
    ]
    side = SIDES["cpu"]
    a, w = (torch.zeros(side * side * size, dtype=torch.uint8) for _ in range(2))
    out, zeros = torch.empty(side * side * 4, dtype=torch.uint8), torch.zeros(side)
    fields = {
        "kind": native.KINDS["PRODUCT"], "type": native.TYPES[type_], "out_type": native.TYPES[out_type], "images": 1,
        "lines": 1, "cells": ROWS, "depth": side, "width": side, "source_cell": side * size, "segments": 1,
        "out_cell": side * (4 if out_type == "FP32" else 2), "source": a.data_ptr(), "weight": w.data_ptr(),
        "out": out.data_ptr(), "bias": zeros.data_ptr(), "scale": zeros.data_ptr(),
    }  # fmt: skip
    ops = (native.Op * 1)(native.Op(**fields))
    return Product(
        by="our kernel",
        gmacs=ROWS * side**2 / 1e9,
        call=lambda: native.run(ops, torch.get_num_threads()),
        operands=(a, w, out, zeros),
    )


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one image costs, in thousands of millions."""

    gmacs: float
    gelu_g: float
    softmax_g: float
    depthwise_gmacs: float
    maps_g: float  # elements that go from one operation to the next, read and written once each


def work_of(config: ModelConfig) -> Work:
    """Count the work of a network on one image of its own size."""
    stem = config.widths[0] * _cells(config.grids[0])
    gelu, softmax, depthwise, maps = stem * (config.depths[0] - 1), 0, 0, 2.0 * stem * config.depths[0]
    for block in unroll(config):
        cells, hidden = _cells(block.grid), EXPANSION * block.out_dim
        if block.kind == "C":
            gelu += 2 * hidden * cells
            depthwise += 9 * hidden * cells
            maps += (4 * hidden + 2 * block.out_dim) * cells
        else:
            gelu += hidden * cells
            softmax += block.out_dim // config.head_dim * cells**2
            maps += (2 * hidden + 14 * block.out_dim) * cells
    products = count(config).gmacs - depthwise / 1e9
    return Work(
        gmacs=products, gelu_g=gelu / 1e9, softmax_g=softmax / 1e9, depthwise_gmacs=depthwise / 1e9, maps_g=maps / 1e9
    )


def _cells(grid: tuple[int, int]) -> int:
    return grid[0] * grid[1]


def roofline(config: ModelConfig, rates: Rates, precision: str) -> dict[str, float]:
    """Return the ms that each kind of work of one image takes at the machine's own rates."""
    work = work_of(config)
    map_bytes = {"fp32": 4, "bf16": 2, "int8": 1}[precision]
    return {
        "products": 1e3 * work.gmacs / rates.products_gmacs_per_s,
        "gelu": 1e3 * work.gelu_g / rates.gelu_g_per_s,
        "softmax": 1e3 * work.softmax_g / rates.softmax_g_per_s,
        "depthwise": 1e3 * work.depthwise_gmacs / rates.depthwise_gmacs_per_s,
        "copy": 1e3 * work.maps_g * map_bytes / rates.copy_gb_per_s,
    }


def median_rates(found: list[Rates]) -> Rates:
    """Return the rates' medians, for a limit measured before, between and after."""

    def middle(name: str) -> Any:
        values = [getattr(rates, name) for rates in found]
        return None if None in values else statistics.median(values)

    return Rates(
        products_gmacs_per_s=middle("products_gmacs_per_s"), products_by=found[0].products_by,
        gelu_g_per_s=middle("gelu_g_per_s"), softmax_g_per_s=middle("softmax_g_per_s"),
        depthwise_gmacs_per_s=middle("depthwise_gmacs_per_s"), copy_gb_per_s=middle("copy_gb_per_s"),
        round_trip_ns=middle("round_trip_ns"),
    )  # fmt: skip
