"""What a person sees of a study: one bar over its runs on a terminal, a line a run everywhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from coatnet.studies.runs import Cell
from coatnet.training.run import Tick


class Shown:
    """Show how far the runs are, while its bar is entered."""

    def __init__(self, console: Console, num_runs: int) -> None:
        self.console = console
        self.num_done = 0
        self.num_runs = num_runs
        self.bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self.task = self.bar.add_task("starting", total=num_runs)

    def listener(self, cell: Cell) -> Callable[[Tick], None]:
        """Return what hears the updates of a run."""

        def hear(tick: Tick) -> None:
            share = tick.step / tick.num_steps
            words = f"{cell.name}: step {tick.step}/{tick.num_steps}"
            self.bar.update(self.task, description=words, completed=self.num_done + share)
            if tick.message is not None:
                self.console.print(f"  {cell.name}: {tick.message}")

        return hear

    def done(self, cell: Cell, result: dict[str, Any]) -> None:
        """Tell of a run that is there."""
        self.num_done += 1
        self.bar.update(self.task, completed=self.num_done)
        self.console.print(
            f"{self.num_done}/{self.num_runs}  {cell.name}: top-1 {result['top1_percent']:.2f} %, "
            f"training loss {result['train_loss']:.4f}, {result['seconds']:.0f} s"
        )
