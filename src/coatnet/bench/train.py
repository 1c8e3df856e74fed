"""`coatnet bench train`: one update of ours against one of timm's, eager and compiled, and the memory of each."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from coatnet.bench.infer import OURS, limits, lively, random_images
from coatnet.bench.machine import measure_rates, median_rates
from coatnet.bench.memory import peak_mib
from coatnet.bench.peers import Library, check_same_answers, check_same_work, timm_twin
from coatnet.bench.turns import ratio, take_turns
from coatnet.config import ModelConfig
from coatnet.errors import CoatnetError
from coatnet.fast.training import for_training

ROUNDS, TURN_S = 3, 4.0
Update = Callable[[], object]
FORMS = ("coatnet", "coatnet checkpointed", "timm eager")  # whose memory is measured, each in a process of its own


def make_update(model: nn.Module, config: ModelConfig, batch: int, precision: str, device: torch.device) -> Update:
    """Return one update as a call: forward, loss, backward, AdamW."""
    model = model.to(device, memory_format=torch.channels_last).train()  # pyright: ignore[reportCallIssue]
    for parameter in model.parameters():
        parameter.requires_grad_()
    images = random_images(config, batch, device).to(memory_format=torch.channels_last)
    targets = torch.arange(batch, device=device) % config.num_classes
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)

    def update() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = model(images)
        F.cross_entropy(logits.float(), targets).backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return update


def _form(name: str, config: ModelConfig) -> nn.Module:
    """Build the network in one of its forms."""
    model = lively(replace(config, stochastic_depth_rate=0.0))
    if name == "timm eager":
        return timm_twin(model)
    if name == "timm compiled":
        return torch.compile(timm_twin(model), dynamic=False)  # pyright: ignore[reportReturnType]
    model.activation_checkpointing = name.endswith("checkpointed")
    return for_training(model)


def bench_train(
    config: ModelConfig,
    *,
    batch: int,
    precision: str,
    libraries: Sequence[Library],
    device: torch.device,
    rounds: int = ROUNDS,
) -> dict[str, Any]:
    """Measure updates of one batch size; return a row of figures. Raises: as `bench_infer`."""
    names = ["coatnet", *(["timm eager", "timm compiled"] if "timm" in libraries else [])]
    models = {name: _form(name, config) for name in names}
    if len(models) > 1:
        _check_gradients(config, precision)
    updates = {name: make_update(model, config, batch, precision, device) for name, model in models.items()}
    rates = [measure_rates(precision, device)]
    start = time.perf_counter()
    timings = take_turns(updates, rounds=rounds, turn_s=TURN_S)
    rates.append(measure_rates(precision, device))
    images_per_s = {name: batch / timing.median_s for name, timing in timings.items()}
    best = max((name for name in names if name != OURS), key=lambda name: images_per_s[name], default=None)
    shares = limits(config, median_rates(rates), precision, {name: 3 * value for name, value in images_per_s.items()})
    shares["limit_images_per_s"] /= 3  # a backward pass costs two forward ones
    memory = {name: measure_memory(name, config, batch, precision, device) for name in FORMS if name in models or best}
    return {
        "work": f"training {precision}", "model": config.name, "image_size": list(config.image_size), "batch": batch,
        "threads": torch.get_num_threads(), "images_per_s": images_per_s,
        "timings": {name: timing.to_dict() for name, timing in timings.items()}, "best_peer": best,
        "ratio": asdict(ratio(timings[OURS], timings[best])) if best else None, "peak_memory_mib": memory,
        "seconds": time.perf_counter() - start, **shares,
    }  # fmt: skip


def _check_gradients(config: ModelConfig, precision: str) -> None:
    """Hold one loss and its gradient against timm's, on two images. Raises: DifferentWorkError."""
    ours, twin = _form("coatnet", config), _form("timm eager", config)
    check_same_work(lively(config), twin)
    found: list[torch.Tensor] = []
    for model in (ours, twin):
        model.train().requires_grad_()
        images = random_images(config, 2, torch.device("cpu"))
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            logits = model(images).float()
        F.cross_entropy(logits, torch.arange(2)).backward()
        gradient = next(iter(model.parameters())).grad
        assert gradient is not None
        found.append(gradient.flatten())
    # The first layer's gradient has come through every other layer; bf16 rounds on all that way.
    check_same_answers(found[0], found[1], "fp32" if precision == "fp32" else "int8", "the gradient")


def measure_memory(name: str, config: ModelConfig, batch: int, precision: str, device: torch.device) -> float | None:
    """Return the MiB that updates add to what is resident before, measured in a process of its own."""
    task = {"name": name, "config": config.to_dict(), "batch": batch, "precision": precision, "device": str(device)}
    command = [sys.executable, "-m", "coatnet.bench.train", json.dumps(task), str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CoatnetError(f"The memory of '{name}' could not be measured: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def _memory_of(task: dict[str, Any]) -> float | None:
    config, device = ModelConfig.from_dict(task["config"]), torch.device(task["device"])
    update = make_update(_form(task["name"], config), config, task["batch"], task["precision"], device)
    grown = peak_mib(update, device)  # the first update also makes the optimizer's state: it counts for all alike
    again = peak_mib(update, device)
    return None if grown is None or again is None else max(grown, again)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    print(json.dumps(_memory_of(json.loads(sys.argv[1]))))
