"""Timing in turns: contenders alternate within one run, so that whatever slows the machine slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.progress import Progress


@dataclass(frozen=True, slots=True)
class Timing:
    """What one contender took a call."""

    median_s: float
    low_s: float  # a quarter of the calls took less
    high_s: float  # a quarter took more
    rounds_s: tuple[float, ...]  # the median of each turn
    num_calls: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Ratio:
    """How much faster one is than another: the median over the rounds, with the extremes."""

    median: float
    low: float
    high: float


def take_turns(
    contenders: Mapping[str, Callable[[], object]], *, rounds: int, turn_s: float, warm_up: bool = True
) -> dict[str, Timing]:
    """Call each for `turn_s` seconds, at least once, in each of the rounds; a turn's first is not timed, to warm up."""
    turns: dict[str, list[list[float]]] = {name: [] for name in contenders}
    stderr = Console(stderr=True)
    with Progress(console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task("measuring", total=rounds * len(contenders))
        for _ in range(rounds):
            for name, call in contenders.items():
                bar.update(task, description=name)
                turns[name].append(_turn(call, turn_s, warm_up))
                bar.advance(task)
    return {name: _timing(found) for name, found in turns.items()}


def _turn(call: Callable[[], object], turn_s: float, warm_up: bool) -> list[float]:
    if warm_up:
        call()
    times: list[float] = []
    while not times or sum(times) < turn_s:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def _timing(turns: list[list[float]]) -> Timing:
    every = sorted(value for turn in turns for value in turn)
    low, median, high = statistics.quantiles(every, n=4, method="inclusive") if len(every) > 1 else every * 3
    return Timing(median, low, high, tuple(statistics.median(turn) for turn in turns), len(every))


def ratio(ours: Timing, theirs: Timing) -> Ratio:
    """Return their time over ours, round by round."""
    found = [b / a for a, b in zip(ours.rounds_s, theirs.rounds_s, strict=True)]
    return Ratio(statistics.median(found), min(found), max(found))
