"""What `coatnet train` does with what was typed: choose, say why, train, say where the result lies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from coatnet.config import TrainConfig
from coatnet.data.sources import name_of
from coatnet.errors import ConfigError
from coatnet.evaluation.tables import interval_text
from coatnet.ranks import is_first_rank, was_restarted
from coatnet.training import run_folder
from coatnet.training.allocator import keep_freed_memory
from coatnet.training.choices import choose_config, differing
from coatnet.training.finish import Result, in_words
from coatnet.training.loop import train
from coatnet.training.progress import Shown
from coatnet.training.reproduce import reproduce

RUNS = Path("runs")


def train_from_flags(
    data: str | None, out: Path | None, *, resume: bool, overwrite: bool, given: dict[str, Any], quiet: bool
) -> Result:
    """Train as the command line says; `given` holds settings by the config's names. Raises: as `train`."""
    console = _console(quiet)
    run = _to_go_on_with(data, out, resume)
    if run is not None:
        config = _resumed(run, data, given)
        console.print(f"resuming {config.out}")
    else:
        if data is None:
            raise ConfigError("Which pictures? Give a folder: coatnet train PICTURES")
        config, reasons = choose_config(data, str(out or RUNS / name_of(data)), given)
        for reason in reasons:
            console.print(f"  {reason}")
    keep_freed_memory(sparing=config.activation_checkpointing)
    with Shown(console) as shown:
        start = "resume" if run is not None else "overwrite" if overwrite else "new"
        result = train(config, start=start, progress=shown)
    _close(console, result)
    return result


def reproduce_run(run: Path, out: Path | None, *, quiet: bool) -> Result:
    """Do a run again and say whether it came out alike. Raises: as `reproduce`."""
    console = _console(quiet)
    console.print(f"doing {run} again")
    with Shown(console) as shown:
        result = reproduce(run, out, console, shown)
    _close(console, result)
    return result


def _console(quiet: bool) -> Console:
    return Console(stderr=quiet, quiet=not is_first_rank(), soft_wrap=True, highlight=False, markup=False, emoji=False)


def _to_go_on_with(data: str | None, out: Path | None, resume: bool) -> Path | None:
    """Return the run to resume: the one asked for, where it is begun, or what this very job began before a restart."""
    if not (resume or (data and was_restarted())):
        return None
    run = out or (RUNS / name_of(data) if data else run_folder.newest_run(RUNS))
    is_there = run_folder.is_begun(run) if resume else run_folder.is_of_this_job(run)
    return run if data is None or is_there else None


def _resumed(run: Path, data: str | None, given: dict[str, Any]) -> TrainConfig:
    """Return the run's config; what was given with --resume must be what the run has."""
    config = run_folder.read_config(run)
    if data is not None and Path(data).resolve() != Path(config.data).resolve():
        raise ConfigError(f"{run} was trained on {config.data}, not on {data}. Give that, or another --out.")
    if others := differing(config, given):
        raise ConfigError(
            f"{run} was begun with another {', '.join(others)}. A run is resumed with its own settings: "
            "leave these out, or give another --out."
        )
    return replace(config, out=str(run))


def _close(console: Console, result: Result) -> None:
    """Say what came out and what to do next."""
    if result.was_interrupted:
        console.print(f"Stopped. Go on with: coatnet train --resume --out {result.run}")
    if result.num_bad_images:
        where = "report" if result.summary is not None else "record"
        console.print(f"{result.num_bad_images} files could not be read; the {where} lists them.")
    if result.summary is not None:
        top1 = f"{result.summary.top1_percent:.2f} % ({interval_text(result.summary.top1_interval)})"
        console.print(f"top-1 {top1} on {result.summary.n} {result.part} pictures")
        console.print(f"report: {result.run / 'report.html'}")
    console.print(f"trained in {in_words(result.seconds)}")
    console.print(f"use it: coatnet predict {result.run} IMAGES")
