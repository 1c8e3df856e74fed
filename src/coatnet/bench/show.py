"""A measurement of `coatnet bench`: run, recorded, and shown."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from coatnet.errors import ConfigError
from coatnet.files import write_json
from coatnet.record import make_record


def measure(kind: str, run: Callable[[], list[dict[str, Any]]], *, threads: int, out: Path | None, quiet: bool) -> Any:
    """Run a measurement with so many threads, show its rows, and return its record, written to `out` where given.

    Raises: ConfigError for less than no thread, and what the measurement raises.
    """
    start = time.perf_counter()
    with _threads(threads):
        rows = run()
        record = make_record(
            kind=f"bench {kind}",
            figures={"rows": rows},
            seeds=[],
            n=sum(map(_num_measurements, rows)),
            seconds=time.perf_counter() - start,
        )
    if out is not None:
        write_json(out, record)
    if not quiet:
        for row in rows:
            show(row)
    return record


@contextmanager
def _threads(count: int) -> Generator[None]:
    if count < 0:
        raise ConfigError(f"threads are {count}. Give 1 or more, or 0 for as many as torch takes.")
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _num_measurements(row: dict[str, Any]) -> int:
    """Return how many pictures, timed calls or points of curves are behind a row."""
    if "n" in row:
        return row["n"]
    if "curves" in row:
        return sum(map(len, row["curves"].values()))
    return sum(timing["num_calls"] for timing in row["timings"].values())


def show(row: dict[str, Any]) -> None:
    """Print one measurement under its title, as its kind is read best."""
    console = Console(highlight=False)
    where = ", ".join(f"{name} {row[name]}" for name in ("model", "image_size", "batch", "threads") if name in row)
    console.print(f"\n[bold]{row['work']}[/bold]  {where}")
    kinds = {"curves": _growth, "agreement_percent": _agreement, "top1_percent": _accuracies}
    lines = next((lines for key, lines in kinds.items() if key in row), _comparison)
    for line in lines(row):
        console.print(line)


def _growth(row: dict[str, Any]) -> Iterator[str]:
    for name, factor in row["steeper"].items():
        yield f"{name}: time a multiply-add grows {factor:.2f} times at most ({row['allowed']} allowed)"


def _agreement(row: dict[str, Any]) -> Iterator[str]:
    low, high = row["agreement_interval"]
    yield (
        f"agrees with fp32 on {row['agreement_percent']:.2f} % ({low:.2f} to {high:.2f}) of {row['n']} pictures; "
        f"top-1 {row['top1_percent']:.2f} %, fp32 {row['fp32_top1_percent']:.2f} %"
    )


def _accuracies(row: dict[str, Any]) -> Iterator[str]:
    for name, values in row["top1_percent"].items():
        spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
        yield (
            f"{name}: top-1 {statistics.mean(values):.2f} %{spread}, {len(values)} seeds, "
            f"{row['images'][name]:,} pictures seen at {statistics.median(row['rates'][name]):.0f} a second"
        )


def _comparison(row: dict[str, Any]) -> Iterator[str | Table]:
    """Yield a line a contender, the ratio, and what the machine could do."""
    yield _contenders(row)
    if row["ratio"]:
        found = row["ratio"]
        yield (
            f"ratio to {row['best_peer']}: [bold]{found['median']:.2f}[/bold] "
            f"({found['low']:.2f} to {found['high']:.2f})"
        )
    for name, memory in row.get("peak_memory_mib", {}).items():
        if name not in row["images_per_s"]:
            yield f"{name}: peak {memory:.0f} MiB" if memory else f"{name}: peak memory not known"
    if "roofline_ms" in row:
        parts = ", ".join(f"{name} {value:.2f}" for name, value in row["roofline_ms"].items())
        rates = row["rates"]
        yield (
            f"limit by products {row['limit_images_per_s']:.1f} images/s "
            f"({2 * rates['products_gmacs_per_s']:.0f} GFLOP/s by {rates['products_by']}); "
            f"roofline, ms an image: {parts}"
        )
        if rates["round_trip_ns"]:
            yield f"a cache line goes to another core and back in {rates['round_trip_ns']:.0f} ns"


def _contenders(row: dict[str, Any]) -> Table:
    table = Table()
    for heading in ("", "images/s", "ms, quartiles", "peak MiB", "% of limit"):
        table.add_column(heading, justify="left" if not heading else "right")
    for name, rate in row["images_per_s"].items():
        timing = row["timings"][name]
        spread = f"{1e3 * timing['median_s']:.1f}  ({1e3 * timing['low_s']:.1f} to {1e3 * timing['high_s']:.1f})"
        others = (row.get(kind, {}).get(name) for kind in ("peak_memory_mib", "percent_of_limit"))
        table.add_row(name, f"{rate:.2f}", spread, *("-" if value is None else f"{value:.0f}" for value in others))
    return table
