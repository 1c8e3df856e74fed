"""The command `coatnet study`: what it takes. Torch loads only where runs are to be done."""

from __future__ import annotations

import re
import signal
from pathlib import Path

from cyclopts import App

from coatnet.errors import ConfigError
from coatnet.typed import STOPPED, Device, Json, ScaleName, print_json

study = App(
    name="study",
    help="Repeat the paper's comparisons on your own pictures; each answer carries its uncertainty.",
    help_epilogue="Start with:  coatnet study list\n\nThen:        coatnet study lineage --scale toy",
    help_format="plaintext",
)


@study.command(name="list")
def list_studies(*, scale: ScaleName = "small", seeds: int = 3, json: Json = False) -> None:
    """Show the studies: what they ask, their rows, what they cost.

    Example: coatnet study list --scale paper
    """
    from coatnet.studies.listed import rows, show

    found = rows(scale, seeds)
    print_json(found) if json else show(found, scale)


@study.default
def run_study(
    name: str,
    *,
    data: str | None = None,
    pretraining_data: str | None = None,
    scale: ScaleName = "small",
    seeds: int = 3,
    out: Path = Path("studies"),
    shard: str | None = None,
    device: Device = "auto",
    json: Json = False,
) -> int:
    """Do a study's trainings, answer the paper's orderings, write a page, a picture and a record.

    Example: coatnet study lineage --scale toy

    What is done is not done again: the same command goes on after any end. Several of them with one --out, in several
    shells, divide the work; under torchrun each training takes all ranks.

    Parameters
    ----------
    name: str
        A study from `coatnet study list`.
    data: str
        Pictures as `coatnet train` takes them, in place of the scale's own.
    pretraining_data: str
        For the study of transfer: what is learned first, in place of the scale's own.
    scale: str
        toy (a minute), small (a laptop's hours), medium (a GPU's day), paper (ImageNet, a cluster).
    seeds: int
        Runs of each row; an answer takes 3 at least.
    out: Path
        Where runs and results lie.
    shard: str
        Do the i-th of n shares, like 2/4; copy the folders runs/ of all machines into one, and ask again there.
    """
    import os
    import sys

    from rich.console import Console

    from coatnet.ranks import is_first_rank
    from coatnet.studies.command import do_study
    from coatnet.studies.runs import Stopped

    if seeds < 1:
        raise ConfigError(f"--seeds is {seeds}. Give 1 or more; an answer takes 3.")
    terminal = sys.stderr if json else sys.stdout
    width = None if terminal.isatty() else int(os.environ.get("COLUMNS", "1000"))  # off a terminal nothing is cut
    console = Console(stderr=json, width=width, quiet=not is_first_rank(), highlight=False, markup=False, emoji=False)
    try:
        record = do_study(
            name,
            data=data,
            pretraining_data=pretraining_data,
            scale_name=scale,
            num_seeds=seeds,
            out=out,
            shard=parse_shard(shard) if shard else None,
            device=device,
            console=console,
        )
    except Stopped as stopped:
        console.print("Stopped. The same command goes on.")
        return STOPPED if stopped.by == signal.SIGINT else 0
    if json and record is not None:
        print_json(record)
    return 0


def parse_shard(text: str) -> tuple[int, int]:
    """Return (i, n) of "i/n", i from 1. Raises: ConfigError."""
    match = re.fullmatch(r"(\d+)/(\d+)", text.strip())
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ConfigError(f"A shard of '{text}' cannot be read. Give it like 2/4: the second of four shares.")
    return int(match[1]), int(match[2])
