"""How fast the networks of a study train and answer, and what memory an update takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch

from coatnet.bench.infer import OURS, lively, random_images, synchronised
from coatnet.bench.memory import peak_mib
from coatnet.bench.train import make_update, measure_memory
from coatnet.bench.turns import Timing, take_turns
from coatnet.config import ModelConfig, TrainConfig
from coatnet.fast.engines import optimize_at_once
from coatnet.fast.training import for_training
from coatnet.ranks import find_device

ROUNDS, TURN_S = 3, 0.2
MAX_BATCH = 64  # pictures at once: an update of thousands is gathered in pieces


def measure_speed(configs: Mapping[str, TrainConfig]) -> list[dict[str, Any]]:
    """Time updates, then inference, of all rows in turns, by name.

    Size, precision and device are those of each config, and the batch up to MAX_BATCH.
    The memory is that of one update, beyond what is resident before: on the CPU measured in a process of its own,
    since memory that the one before gave back is not seen to grow again. None where the system does not tell.
    """
    # The networks are not looked at in between: all of a kind lie in memory together, to take turns.
    updates = {row: _update(config) for row, config in configs.items()}
    memory = {row: _training_mib(config, updates[row]) for row, config in configs.items()}
    trained = take_turns(updates, rounds=ROUNDS, turn_s=TURN_S)
    del updates
    answered = take_turns({row: _inference(config) for row, config in configs.items()}, rounds=ROUNDS, turn_s=TURN_S)
    return [
        {
            "row": row,
            "device": str(find_device(config.device)),
            "batch": _batch(config),
            "precision": config.precision,
            "images_per_s": _rate(trained[row], _batch(config)),
            "training_mib": memory[row],
            "inference_images_per_s": _rate(answered[row], _batch(config)),
        }
        for row, config in configs.items()
    ]


def _batch(config: TrainConfig) -> int:
    return min(MAX_BATCH, config.global_batch_size)


def _network(config: TrainConfig) -> ModelConfig:
    """Return the network without dropped paths, whose draws come from the training loop."""
    return replace(config.model, stochastic_depth_rate=0.0)


def _update(config: TrainConfig) -> Callable[[], object]:
    device, network = find_device(config.device), _network(config)
    model = for_training(lively(network).to(device), compiled=config.compile)
    return synchronised(make_update(model, network, _batch(config), config.precision, device), device)


def _training_mib(config: TrainConfig, update: Callable[[], object]) -> float | None:
    device = find_device(config.device)
    if device.type == "cpu":
        return measure_memory(OURS, _network(config), _batch(config), config.precision)
    return peak_mib(update, device) if device.type == "cuda" else None


def _inference(config: TrainConfig) -> Callable[[], object]:
    device, network = find_device(config.device), _network(config)
    model = optimize_at_once(lively(network).to(device), precision=config.precision)
    images = random_images(network, _batch(config), device)

    def answer() -> None:
        with torch.inference_mode():
            model(images)

    return synchronised(answer, device)


def _rate(timing: Timing, batch: int) -> dict[str, float]:
    """Return images a second: the median, and between which the middle half of the calls lies."""
    return {"median": batch / timing.median_s, "low": batch / timing.high_s, "high": batch / timing.low_s}
