"""What `coatnet bench` does with what was typed, and what it prints."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from coatnet.bench.peers import LIBRARIES
from coatnet.config import ModelConfig
from coatnet.errors import ConfigError, name_hint
from coatnet.files import write_json
from coatnet.ranks import find_device
from coatnet.record import make_record
from coatnet.zoo import find


def measure(kind: str, run: Callable[[], list[dict[str, Any]]], *, threads: int, out: Path | None, quiet: bool) -> Any:
    """Run a measurement with so many threads, show its rows, and return its record, written to `out` where given."""
    start = time.perf_counter()
    with _threads(threads):
        rows = run()
        record = make_record(
            kind=f"bench {kind}", figures={"rows": rows}, seeds=[], n=len(rows), seconds=time.perf_counter() - start
        )
    if out is not None:
        write_json(out, record)
    if not quiet:
        for row in rows:
            show(row)
    return record


def parse_model(name: str) -> ModelConfig:
    """Return a network's config. Raises: ConfigError with the nearest name."""
    return find(name).config


def parse_counts(text: str) -> list[int]:
    """Return the numbers of "1,16". Raises: ConfigError unless all are whole and 1 or more."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise ConfigError(f"Numbers came as '{text}'. Give whole numbers of 1 or more, like 1,16.")
    return [int(part) for part in parts]


def parse_choices(text: str, allowed: tuple[str, ...]) -> list[Any]:
    """Return the words of "fp32,bf16". Raises: ConfigError with the nearest word."""
    parts = [part.strip() for part in text.split(",")]
    for part in parts:
        if part not in allowed:
            raise ConfigError(f"There is no '{part}' to choose. {name_hint(part, allowed)}")
    return parts


def parse_libraries(text: str) -> list[Any]:
    """Return the peers named, none for "none". Raises: ConfigError with the nearest name."""
    return [] if text == "none" else parse_choices(text, LIBRARIES)


def parse_device(name: str) -> torch.device:
    """Return the device of that name. Raises: ConfigError where it is not there."""
    return find_device(name)


@contextmanager
def _threads(count: int) -> Generator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def show(row: dict[str, Any]) -> None:
    """Print one comparison: a line a contender, the ratio, and what the machine could do."""
    console = Console(highlight=False)
    where = ", ".join(f"{name} {row[name]}" for name in ("model", "image_size", "batch", "threads") if name in row)
    console.print(f"\n[bold]{row['work']}[/bold]  {where}")
    if "curves" in row:
        for name, factor in row["steeper"].items():
            console.print(f"{name}: time a multiply-add grows {factor:.2f} times at most ({row['allowed']} allowed)")
        return
    if "agreement_percent" in row:
        low, high = row["agreement_interval"]
        console.print(
            f"agrees with fp32 on {row['agreement_percent']:.2f} % ({low:.2f} to {high:.2f}) of {row['n']} pictures; "
            f"top-1 {row['top1_percent']:.2f} %, fp32 {row['fp32_top1_percent']:.2f} %"
        )
        return
    table = Table()
    for heading in ("", "images/s", "ms, quartiles", "peak MiB", "% of limit"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, rate in row["images_per_s"].items():
        timing = row["timings"][name]
        spread = f"{1e3 * timing['median_s']:.1f}  ({1e3 * timing['low_s']:.1f} to {1e3 * timing['high_s']:.1f})"
        memory = row.get("peak_memory_mib", {}).get(name)
        share = row.get("percent_of_limit", {}).get(name)
        table.add_row(
            name,
            f"{rate:.2f}",
            spread,
            "-" if memory is None else f"{memory:.0f}",
            "-" if share is None else f"{share:.0f}",
        )
    console.print(table)
    if row["ratio"]:
        found = row["ratio"]
        console.print(
            f"ratio to {row['best_peer']}: [bold]{found['median']:.2f}[/bold] "
            f"({found['low']:.2f} to {found['high']:.2f})"
        )
    for name, memory in row.get("peak_memory_mib", {}).items():
        if name not in row["images_per_s"]:
            console.print(f"{name}: peak {memory:.0f} MiB" if memory else f"{name}: peak memory not known")
    if "roofline_ms" in row:
        parts = ", ".join(f"{name} {value:.2f}" for name, value in row["roofline_ms"].items())
        rates = row["rates"]
        console.print(
            f"limit by products {row['limit_images_per_s']:.1f} images/s "
            f"({2 * rates['products_gmacs_per_s']:.0f} GFLOP/s by {rates['products_by']}); "
            f"roofline, ms an image: {parts}"
        )
