"""`coatnet bench infer`: our fast form against timm's network in every form that others' tools give it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from coatnet.bench.machine import Rates, measure_rates, median_rates, roofline, work_of
from coatnet.bench.memory import peak_mib
from coatnet.bench.peers import Forward, Library, check_same_answers, check_same_work, contenders, timm_twin
from coatnet.bench.turns import ratio, take_turns
from coatnet.bench.weights import scramble
from coatnet.config import ModelConfig, Precision
from coatnet.errors import ConfigError
from coatnet.fast.engines import OptimizedModel, optimize
from coatnet.model.network import CoAtNet

ROUNDS, TURN_S = 5, 1.0
NUM_CALIBRATION = 32
OURS = "coatnet"


def bench_infer(
    config: ModelConfig,
    *,
    batches: Sequence[int],
    precisions: Sequence[Precision],
    libraries: Sequence[Library],
    device: torch.device,
    rounds: int = ROUNDS,
) -> list[dict[str, Any]]:
    """Measure every batch size in every precision; return a row of figures each.

    Off the CPU int8 is left out: it would be computed in bf16.
    Raises: ConfigError for a network or a library that is not there; DifferentWorkError if outputs disagree.
    """
    precisions = [precision for precision in precisions if precision != "int8" or device.type == "cpu"]
    if not precisions:
        raise ConfigError(f"8 bits are computed on the CPU alone, not on {device.type}. Give --dtype bf16.")
    model = lively(config).to(device)
    twin = None
    if libraries:
        twin = timm_twin(model).to(device)
        check_same_work(model, twin)
    calibration = [random_images(model.config, NUM_CALIBRATION, device, seed=1)]
    return [
        _measure(model, twin, precision, batch, libraries, calibration, rounds)
        for precision in precisions
        for batch in batches
    ]


def optimize_as_asked(model: nn.Module, precision: Precision, calibration: Sequence[Tensor]) -> OptimizedModel:
    """Return our fast form. Raises: ConfigError where it would compute in another precision than is asked."""
    made = optimize(model, precision=precision, calibration=calibration)
    if made.precision != precision:
        raise ConfigError(f"{precision} is not to be had here ({'; '.join(made.notes)}). Give another --dtype.")
    return made


def lively(config: ModelConfig) -> CoAtNet:
    """Build a network whose random weights and statistics leave no part of it idle."""
    model = CoAtNet(config).eval().requires_grad_(False)
    scramble(model)
    return model


def random_images(config: ModelConfig, count: int, device: torch.device, seed: int = 0) -> Tensor:
    """Return standard normal images (count, C, H, W) float32."""
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(count, config.in_channels, *config.image_size, generator=rng).to(device)


def _measure(
    model: CoAtNet,
    twin: nn.Module | None,
    precision: Precision,
    batch: int,
    libraries: Sequence[Library],
    calibration: Sequence[Tensor],
    rounds: int,
) -> dict[str, Any]:
    device = model.classifier.weight.device
    images = random_images(model.config, batch, device)
    with torch.inference_mode():
        want = model(images)
    makers: dict[str, Callable[[], Forward]] = {OURS: lambda: optimize_as_asked(model, precision, calibration)}
    if twin is not None:
        makers |= contenders(twin, libraries, precision, images, calibration)
    forms: dict[str, Forward] = {}
    memory, errors = dict[str, float | None](), dict[str, float]()
    for name, make in makers.items():

        def make_and_call(name: str = name, make: Callable[[], Forward] = make) -> None:
            forms[name] = forms.get(name) or make()
            errors[name] = check_same_answers(forms[name](images), want, precision, name)

        memory[name] = peak_mib(make_and_call, device)
    rates = [measure_rates(precision, device)]
    calls = {name: synchronised(partial(form, images), device) for name, form in forms.items()}
    start = time.perf_counter()
    timings = take_turns(calls, rounds=rounds, turn_s=TURN_S)
    rates.append(measure_rates(precision, device))
    limit = median_rates(rates)
    images_per_s = {name: batch / timing.median_s for name, timing in timings.items()}
    others = {name: value for name, value in images_per_s.items() if name != OURS}
    best = max(others, key=lambda name: others[name]) if others else None
    return {
        "work": f"inference {precision}", "model": model.config.name, "image_size": list(model.config.image_size),
        "batch": batch, "device": device.type, "engine": forms[OURS].engine,  # pyright: ignore
        "threads": torch.get_num_threads(),
        "images_per_s": images_per_s, "timings": {name: timing.to_dict() for name, timing in timings.items()},
        "peak_memory_mib": memory, "errors": errors, "best_peer": best,
        "ratio": asdict(ratio(timings[OURS], timings[best])) if best else None,
        "seconds": time.perf_counter() - start, **limits(model.config, limit, precision, images_per_s),
    }  # fmt: skip


def synchronised(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Return a call that ends when the device has done it."""

    def call_and_wait() -> None:
        call()
        torch.cuda.synchronize(device)

    return call_and_wait if device.type == "cuda" else call


def limits(config: ModelConfig, rates: Rates, precision: str, images_per_s: dict[str, float]) -> dict[str, Any]:
    """Return the machine's rates, its limit by products alone, and each contender's share of it."""
    gmacs = work_of(config).gmacs + work_of(config).depthwise_gmacs
    limit = rates.products_gmacs_per_s / gmacs
    return {
        "rates": asdict(rates), "limit_images_per_s": limit,
        "percent_of_limit": {name: 100 * value / limit for name, value in images_per_s.items()},
        "roofline_ms": roofline(config, rates, precision),
    }  # fmt: skip
