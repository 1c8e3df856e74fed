"""What a study costs before it is begun. Reading, evaluation and a small network's overhead are not in it."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from coatnet.config import TrainConfig
from coatnet.layout import count
from coatnet.plan.estimate import H100_TFLOPS, UTILISATION

FORWARD_AND_BACKWARD = 3  # times the multiply-adds of a forward pass
NumImages = Callable[[str], int]  # how many pictures for training a data set has


def images_seen(config: TrainConfig, num_images: int) -> float:
    """Return how many pictures a training sees, of so many that the data set has for training."""
    share = (1 - (config.holdout_percent or 0) / 100) * (config.train_percent or 100) / 100
    return config.num_epochs * share * num_images


def total_images(configs: Iterable[TrainConfig], num_images: NumImages) -> float:
    """Return how many pictures these trainings see."""
    return sum(images_seen(config, num_images(config.data)) for config in configs)


def total_macs(configs: Iterable[TrainConfig], num_images: NumImages) -> float:
    """Return the multiply-adds of these trainings, forward and backward."""
    return sum(
        FORWARD_AND_BACKWARD * 1e9 * count(config.model).gmacs * images_seen(config, num_images(config.data))
        for config in configs
    )


def gpu_hours(macs: float) -> float:
    """Return hours of an H100 under the assumptions of `coatnet plan`."""
    return 2 * macs / (UTILISATION * H100_TFLOPS * 1e12) / 3600


def in_words(num_images: float, macs: float) -> str:
    """Put a cost into words; hours of a GPU where there are any."""
    seen = f"{num_images / 1e6:,.1f} M pictures seen" if num_images >= 1e5 else f"{num_images:,.0f} pictures seen"
    work = f"{macs / 1e12:,.0f} T multiply-adds" if macs >= 1e12 else f"{macs / 1e9:,.0f} G multiply-adds"
    hours = gpu_hours(macs)
    said = f", {hours:,.0f} GPU-hours as `coatnet plan` counts for an H100" if hours >= 1 else ""
    return f"{seen}, {work}{said}"
