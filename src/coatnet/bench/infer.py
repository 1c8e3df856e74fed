"""`coatnet bench infer`: our fast form against timm's network in every form that others' tools give it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from coatnet import native
from coatnet.bench.machine import Product, Rates, fastest_product, measure_rates, median_rates, roofline, work_of
from coatnet.bench.memory import peak_mib
from coatnet.bench.peers import Forward, Library, check_same_answers, check_same_work, contenders, timm_twin
from coatnet.bench.turns import Timing, ratio, take_turns
from coatnet.bench.weights import scramble
from coatnet.config import ModelConfig, Precision
from coatnet.errors import ConfigError
from coatnet.fast.engines import OptimizedModel, optimize
from coatnet.model.network import CoAtNet

ROUNDS, TURN_S = 5, 1.0
NUM_CALIBRATION = 32
OURS, PRODUCT = "coatnet", "product"  # the latter is the machine's limit
PROFILED = 5  # passes


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
    product = fastest_product(precision, device)
    rates = [measure_rates(product, precision, device)]
    calls = {name: partial(form, images) for name, form in forms.items()} | {PRODUCT: product.call}
    start = time.perf_counter()
    timings = take_turns({n: synchronised(call, device) for n, call in calls.items()}, rounds=rounds, turn_s=TURN_S)
    rates.append(measure_rates(product, precision, device))
    shares = limits(model.config, precision, product, median_rates(rates), timings, batch)
    del timings[PRODUCT]
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
        "profile_ms": profile_ms(partial(forms[OURS], images), batch), "seconds": time.perf_counter() - start, **shares,
    }  # fmt: skip


def synchronised(call: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """Return a call that ends when the device has done it."""

    def call_and_wait() -> None:
        call()
        torch.cuda.synchronize(device)

    return call_and_wait if device.type == "cuda" else call


def limits(
    config: ModelConfig, precision: str, product: Product, rates: Rates, timings: dict[str, Timing], batch: int,
    passes: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """Return the machine's rates, its limit by products alone, and each contender's share of it, by round.

    `timings` are of batches, each `passes` times the work of inference, and of the product in turns with them.
    """
    gmacs = passes * (work_of(config).gmacs + work_of(config).depthwise_gmacs)
    turns = timings[PRODUCT]
    rates = replace(rates, products_gmacs_per_s=product.gmacs / turns.median_s)
    shares = {
        name: [
            100 * (batch * gmacs / mine_s) / (product.gmacs / limit_s)
            for mine_s, limit_s in zip(timing.rounds_s, turns.rounds_s, strict=True)
        ]
        for name, timing in timings.items()
        if name != PRODUCT
    }
    return {
        "rates": asdict(rates), "limit_images_per_s": rates.products_gmacs_per_s / gmacs,
        "percent_of_limit": {name: statistics.median(found) for name, found in shares.items()},
        "percent_of_limit_by_round": shares,
        "roofline_ms": {kind: passes * ms for kind, ms in roofline(config, rates, precision).items()},
    }  # fmt: skip


def profile_ms(call: Callable[[], object], num_images: int) -> dict[str, float]:
    """Return the ms an image of each kind of our kernels' operations and of the REST; nothing where others compute."""
    found = list[dict[str, float]]()
    for _ in range(PROFILED):
        start = time.perf_counter()
        with native.profiled() as seconds:
            call()
        if not seconds:
            return {}
        seconds["REST"] = time.perf_counter() - start - sum(seconds.values())
        found.append(seconds)
    return {kind: 1e3 / num_images * statistics.median(each[kind] for each in found) for kind in found[0]}
