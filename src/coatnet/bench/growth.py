"""`coatnet bench growth`: how the rate falls as batch, image size and network grow, against the multiply-adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from coatnet.bench.infer import lively, random_images
from coatnet.bench.turns import take_turns
from coatnet.config import ModelConfig, Precision
from coatnet.fast.engines import optimize
from coatnet.layout import count
from coatnet.zoo import ZOO

BATCHES = (1, 2, 4, 8, 16, 32, 64)
SIZES = (224, 288, 320, 384, 448, 512)  # px
NETWORKS = ("coatnet_0", "coatnet_1", "coatnet_2", "coatnet_3", "coatnet_4")
ALLOWED = 1.2  # of the growth of the multiply-adds


@dataclass(frozen=True, slots=True)
class Point:
    """One measured place of a curve."""

    label: str
    batch: int
    gmacs: float  # an image
    images_per_s: float
    low_images_per_s: float
    high_images_per_s: float

    @property
    def s_per_gmac(self) -> float:
        return 1 / (self.images_per_s * self.gmacs)


def bench_growth(config: ModelConfig, precision: Precision, *, rounds: int = 3, turn_s: float = 0.7) -> dict[str, Any]:
    """Measure three curves in turns: batch at the config's size, image size and network at batch 1."""
    models = {"batch": [(f"{batch}", config, batch) for batch in BATCHES]}
    models["image size"] = [(f"{side}", replace(config, image_size=(side, side)), 1) for side in SIZES]
    models["network"] = [(name, ZOO[name].config, 1) for name in NETWORKS]
    curves = {name: _curve(rows, precision, rounds, turn_s) for name, rows in models.items()}
    return {
        "work": f"growth {precision}", "model": config.name, "threads": torch.get_num_threads(),
        "curves": {name: [asdict(point) for point in points] for name, points in curves.items()},
        "steeper": {name: steepest(points) for name, points in curves.items()}, "allowed": ALLOWED,
    }  # fmt: skip


def _curve(
    rows: Sequence[tuple[str, ModelConfig, int]], precision: Precision, rounds: int, turn_s: float
) -> list[Point]:
    calls: dict[str, Any] = {}
    made: dict[ModelConfig, Any] = {}
    for label, config, batch in rows:
        if config not in made:
            model = lively(config)
            calibration = random_images(config, 4, torch.device("cpu"), seed=1)
            made[config] = optimize(model, precision=precision, calibration=calibration)
        calls[label] = partial(made[config], random_images(config, batch, torch.device("cpu")))
    timings = take_turns(calls, rounds=rounds, turn_s=turn_s)
    return [
        Point(
            label, batch, count(config).gmacs, batch / timings[label].median_s, batch / timings[label].high_s,
            batch / timings[label].low_s,
        )
        for label, config, batch in rows
    ]  # fmt: skip


def steepest(points: Sequence[Point]) -> float:
    """Return by what factor the time a multiply-add grows at most beyond that of the curve's first point."""
    return max(point.s_per_gmac for point in points) / points[0].s_per_gmac


def draw_growth(figures: dict[str, Any], path: Path) -> None:
    """Draw the three curves, each with what the multiply-adds alone would give from its first point on, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    for axes, (name, rows) in zip(figure.subplots(1, 3), figures["curves"].items(), strict=True):
        points = [Point(**row) for row in rows]
        labels = [point.label.removeprefix("coatnet_") for point in points]
        rates = [point.images_per_s for point in points]
        errors = [
            [point.images_per_s - point.low_images_per_s for point in points],
            [point.high_images_per_s - point.images_per_s for point in points],
        ]
        axes.errorbar(labels, rates, yerr=errors, marker="o", capsize=3, label="measured, quartiles")
        ideal = [rates[0] * points[0].gmacs / point.gmacs for point in points]
        axes.plot(labels, ideal, "--", color="grey", label="by multiply-adds from the first")
        axes.plot(labels, [rate / figures["allowed"] for rate in ideal], ":", color="tab:red", label="20 % slower")
        axes.set_yscale("log")
        axes.set_ylim(top=1.3 * max(rates), bottom=0.75 * min(ideal) / figures["allowed"])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.set_xlabel({"batch": "batch", "image size": "image size, px", "network": "CoAtNet-"}[name])
        axes.set_ylabel("images/s")
        axes.grid(alpha=0.3, which="both")
        axes.set_title(f"{name}: at most {figures['steeper'][name]:.2f} times steeper")
    figure.axes[0].legend(fontsize=8, loc="lower left")
    figure.suptitle(f"{figures['model']}, {figures['work'].removeprefix('growth ')}, {figures['threads']} threads")
    figure.savefig(path, dpi=120)
