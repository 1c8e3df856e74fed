"""Do a run again and hold it to the first, bit for bit: what `coatnet train --reproduce RUN` does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from coatnet.config import TrainConfig
from coatnet.errors import ConfigError, TrainingError
from coatnet.files import sha256_of
from coatnet.ranks import num_ranks
from coatnet.record import environment
from coatnet.training import checkpoint, run_folder
from coatnet.training.allocator import keep_freed_memory
from coatnet.training.finish import Result
from coatnet.training.loop import train
from coatnet.training.run import Progress


def reproduce(run: Path, out: Path | None, console: Console, progress: Progress) -> Result:
    """Train as `run` was trained, into `out` or RUN-again, and compare weights, optimizer, average and metrics.

    Raises: ConfigError if the run follows a clock or had other ranks; TrainingError naming every file that differs.
    """
    config, start = run_folder.read_config(run), run_folder.read_start(run)
    _check_can_be_done_again(run, config, start)
    for difference in _differences(start, environment()):
        console.print(f"  not as then: {difference}")
    torch.set_num_threads(start["host"]["torch_threads"])
    keep_freed_memory(sparing=config.activation_checkpointing)
    again = out or run.with_name(f"{run.name}-again")
    result = train(replace(config, out=str(again)), progress=progress)
    if not result.was_interrupted:
        _compare(again, run, console)
    return result


def _check_can_be_done_again(run: Path, config: TrainConfig, start: dict[str, Any]) -> None:
    if config.max_time_s is not None:
        raise ConfigError(f"{run} was ended by the clock (--max-time), which no two runs share. Give one by --epochs.")
    if start["num_ranks"] != num_ranks():
        raise ConfigError(
            f"{run} was begun on {start['num_ranks']} ranks, here are {num_ranks()}. Start it with "
            f"torchrun --standalone --nproc-per-node {start['num_ranks']} -m coatnet train --reproduce {run}"
        )
    if not (run / "record.json").is_file():
        raise TrainingError(f"{run} is not done. End it first: coatnet train --resume --out {run}")


def _differences(then: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """Yield what of code, packages and machine is other than then, and may change bits."""
    facts = [("commit", then["commit"], now["commit"])]
    facts += [(name, then["versions"].get(name), now["versions"].get(name)) for name in ("coatnet", "torch", "numpy")]
    facts += [(name, then["host"][name], now["host"][name]) for name in ("platform", "cpu", "gpu")]
    yield from (f"{name} {old}, now {new}" for name, old, new in facts if old != new)


def _compare(again: Path, run: Path, console: Console) -> None:
    found, wanted = _hashes(again), _hashes(run)
    other = sorted(name for name in found | wanted if found.get(name) != wanted.get(name))
    if other:
        raise TrainingError(
            f"{again} came out otherwise than {run}: {', '.join(other)}. What is not as then stands above; the same "
            "code, packages, threads and kind of processor give the same bits."
        )
    console.print(f"{again} equals {run}, bit for bit: {', '.join(sorted(found))}")


def _hashes(run: Path) -> dict[str, str]:
    """Return the SHA-256 of what a run came to; none of these files holds a time."""
    newest, damage = checkpoint.find_newest(run)
    if newest is None:
        raise TrainingError(f"{run} has no whole checkpoint to compare. {' '.join(damage)}")
    files = [*newest.rglob("*.safetensors"), run / "model" / "model.safetensors", run / "metrics.jsonl"]
    return {file.relative_to(run).as_posix(): sha256_of(file) for file in files if file.is_file()}
