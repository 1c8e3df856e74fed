"""What a person sees of a run: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import resource
import sys
import time
from types import TracebackType
from typing import Self

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from coatnet.training.finish import in_words
from coatnet.training.run import Tick

SECONDS_BETWEEN_LINES = 15.0  # off a terminal


class Shown:
    """Show ticks as they come; use it as a context and as `train`'s progress callback."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.last_line_s = time.perf_counter()
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self.task = self.bar.add_task("starting", total=None)

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def __call__(self, tick: Tick) -> None:
        if tick.message is not None:
            self.console.print(tick.message)
            self.last_line_s = time.perf_counter()
        elif not self.console.is_terminal and time.perf_counter() - self.last_line_s > SECONDS_BETWEEN_LINES:
            self.console.print(describe(tick))
            self.last_line_s = time.perf_counter()
        self.bar.update(self.task, description=describe(tick), completed=tick.step, total=tick.num_steps)


def describe(tick: Tick) -> str:
    """Put a tick into one line."""
    loss = "" if tick.loss is None else f"  loss {tick.loss:.4f}"
    return (
        f"step {tick.step}/{tick.num_steps}  epoch {tick.epoch:.2f}{loss}  {tick.images_per_s:.0f} images/s"
        f"  {in_words(tick.eta_s)} left  {memory_mib():.0f} MiB"
    )


def memory_mib() -> float:
    """Return the peak memory of this process: on the GPU where it uses one, else resident."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
