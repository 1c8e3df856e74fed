"""`coatnet bench train`: one update of ours against one of timm's, eager and compiled, and the memory of each.

On a card what is compiled runs, ours as timm's, as one CUDA graph of the whole update, so that the card is measured
and not how fast Python feeds it.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coatnet.bench.infer import OURS, PRODUCT, limits, lively, profile_ms, random_images, synchronised
from coatnet.bench.machine import fastest_product, measure_rates, median_rates
from coatnet.bench.memory import peak_mib
from coatnet.bench.peers import TOLERANCE, DifferentWorkError, Library, check_same_work, share_of, timm_twin
from coatnet.bench.turns import ratio, take_turns
from coatnet.config import ModelConfig
from coatnet.errors import CoatnetError, ConfigError
from coatnet.fast.training import CUDA_OPTIONS, for_training
from coatnet.training.allocator import keep_freed_memory

LOG = logging.getLogger("coatnet")
ROUNDS, TURN_S = 3, 4.0
Update = Callable[[], object]
FORMS = ("coatnet", "coatnet checkpointed", "timm eager")  # whose memory is measured, each in a process of its own
GRADIENT_ERRORS = 1.5  # of ours, times timm's in the same precision
WARM_UPS = 3  # before a CUDA graph is recorded


def make_update(model: nn.Module, config: ModelConfig, batch: int, precision: str, device: torch.device) -> Update:
    """Return one update as a call: forward, loss, backward, AdamW."""
    model = model.to(device, memory_format=torch.channels_last).train()  # pyright: ignore[reportCallIssue]
    for parameter in model.parameters():
        parameter.requires_grad_()
    images = random_images(config, batch, device).to(memory_format=torch.channels_last)
    targets = torch.arange(batch, device=device) % config.num_classes
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True, capturable=device.type == "cuda")

    def update() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            logits = model(images)
        F.cross_entropy(logits.float(), targets).backward()
        optimizer.step()

    return update


def record_update(update: Update) -> Update | None:
    """Record an update as one CUDA graph, which starts all its kernels at once; None where one cannot be recorded."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            update()
    torch.cuda.current_stream().wait_stream(stream)
    try:
        with torch.cuda.graph(graph):
            update()
    except RuntimeError as error:  # some kernel waits for the processor
        LOG.warning("This update is not recorded as a CUDA graph: %s", str(error).splitlines()[0])
        return None
    return graph.replay


def _form(name: str, config: ModelConfig, device: torch.device) -> nn.Module:
    """Build the network in one of its forms."""
    model = lively(replace(config, stochastic_depth_rate=0.0))
    on_cuda = device.type == "cuda"
    if name == "timm eager":
        return timm_twin(model).to(device)
    if name == "timm compiled":
        options = CUDA_OPTIONS if on_cuda else None  # the same as ours
        return torch.compile(timm_twin(model).to(device), dynamic=False, options=options)  # pyright: ignore[reportReturnType]
    model.activation_checkpointing = name.endswith("checkpointed")
    return for_training(model.to(device), compiled=on_cuda)


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
    if unable := [name for name in libraries if name != "timm"]:
        raise ConfigError(f"{', '.join(unable)} cannot train this network. Give --against timm, or none.")
    keep_freed_memory()  # it serves all of them
    names = ["coatnet", *(["timm eager", "timm compiled"] if "timm" in libraries else [])]
    models = {name: _form(name, config, device) for name in names}
    if len(models) > 1:
        _check_gradients(models, config, batch, precision, device)
    updates = {name: make_update(model, config, batch, precision, device) for name, model in models.items()}
    memory, recorded = dict[str, float | None](), list[str]()
    if device.type == "cuda":
        for name in names:
            memory[name] = peak_mib(updates[name], device)
            graph = None if name == "timm eager" else record_update(updates[name])
            if graph is not None:
                updates[name] = graph
                recorded.append(name)
    product = fastest_product(precision, device)
    rates = [measure_rates(product, precision, device)]
    start = time.perf_counter()
    calls = {name: synchronised(call, device) for name, call in (*updates.items(), (PRODUCT, product.call))}
    timings = take_turns(calls, rounds=rounds, turn_s=TURN_S)
    rates.append(measure_rates(product, precision, device))
    # A backward pass costs two forward ones.
    shares = limits(config, precision, product, median_rates(rates), timings, batch, passes=3)
    del timings[PRODUCT]
    images_per_s = {name: batch / timing.median_s for name, timing in timings.items()}
    best = max((name for name in names if name != OURS), key=lambda name: images_per_s[name], default=None)
    if device.type == "cpu":
        measured = [name for name in FORMS if name.startswith(OURS) or name in models]
        memory = {name: measure_memory(name, config, batch, precision) for name in measured}
    return {
        "work": f"training {precision}", "model": config.name, "image_size": list(config.image_size), "batch": batch,
        "device": device.type, "cuda_graphs": recorded, "threads": torch.get_num_threads(),
        "images_per_s": images_per_s, "timings": {name: timing.to_dict() for name, timing in timings.items()},
        "best_peer": best, "ratio": asdict(ratio(timings[OURS], timings[best])) if best else None,
        "peak_memory_mib": memory, "profile_ms": profile_ms(updates[OURS], batch),
        "seconds": time.perf_counter() - start, **shares,
    }  # fmt: skip


def _check_gradients(
    models: dict[str, nn.Module], config: ModelConfig, batch: int, precision: str, device: torch.device
) -> None:
    """Hold the error of a loss's gradient against timm's own, each from timm's in fp32.

    It is the first layer's, which has come through every other. Of the very forms on a card, of two images and without
    what is compiled on a processor.

    Raises: DifferentWorkError.
    """
    ours = lively(config)
    check_same_work(ours, timm_twin(ours))
    if device.type == "cpu":
        models, batch = {name: _form(name, config, device) for name in (OURS, "timm eager")}, 2
    images = random_images(config, batch, device).to(memory_format=torch.channels_last)
    want = _first_gradient(models["timm eager"], images, "fp32")
    errors = {name: share_of(_first_gradient(model, images, precision), want) for name, model in models.items()}
    allowed = max(GRADIENT_ERRORS * errors["timm eager"], TOLERANCE["fp32"])
    for name, error in errors.items():
        if not error <= allowed:
            raise DifferentWorkError(
                f"The gradient of {name} in {precision} errs by {error:.2%} of its deviation, timm's by "
                f"{errors['timm eager']:.2%}: no ratio is printed."
            )


def _first_gradient(model: nn.Module, images: Tensor, precision: str) -> Tensor:
    model.to(memory_format=torch.channels_last).train().requires_grad_()  # pyright: ignore[reportCallIssue]
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        logits = model(images).float()
    F.cross_entropy(logits, torch.arange(len(images), device=images.device) % logits.shape[1]).backward()
    gradient = next(iter(model.parameters())).grad
    assert gradient is not None
    model.zero_grad(set_to_none=True)
    return gradient.flatten()


def measure_memory(name: str, config: ModelConfig, batch: int, precision: str) -> float | None:
    """Return the MiB that updates on the CPU add to what is resident before, measured in a process of its own."""
    task = {"name": name, "config": config.to_dict(), "batch": batch, "precision": precision}
    command = [sys.executable, "-m", "coatnet.bench.train", json.dumps(task), str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise CoatnetError(f"The memory of '{name}' could not be measured: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout)


def _memory_of(task: dict[str, Any]) -> float | None:
    config, device = ModelConfig.from_dict(task["config"]), torch.device("cpu")
    keep_freed_memory(sparing=task["name"].endswith("checkpointed"))  # as `coatnet train` does
    update = make_update(_form(task["name"], config, device), config, task["batch"], task["precision"], device)
    grown = peak_mib(update, device)  # the first update also makes the optimizer's state: it counts for all alike
    again = peak_mib(update, device)
    return None if grown is None or again is None else max(grown, again)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    print(json.dumps(_memory_of(json.loads(sys.argv[1]))))
