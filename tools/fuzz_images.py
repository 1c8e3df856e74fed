"""Hand mutated pictures to the decoder and count what becomes of them: a picture, a bad-image error, or a fault.

    python tools/fuzz_images.py --num 1000000 --out results/fuzz_images.json

Decoding happens in worker processes that are watched: one that dies (a crash), that computes for 10 s without an answer
(a hang) or that raises anything but BadImageError is a fault, and so is memory that grows. The bytes of each fault are
kept in --aside. A file follows from the seed and its index alone, so `--start 1234 --num 1` shows one again, and a long
run may be done in pieces: a piece that begins where the record in --out ends is added to it.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import os
import resource
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
from image_mutations import KINDS, make
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from coatnet.data.decode import decode, read_size
from coatnet.errors import BadImageError
from coatnet.files import read_json
from coatnet.record import write_record

OUTCOMES = ("images", "bad_image_errors", "crashes", "hangs", "other_exceptions")
FAULTS = OUTCOMES[2:]
HANG_S = 10.0  # of a worker's processor time on one file, so that a busy machine makes no hangs
NUM_HANGS_ASLEEP = 12  # times as long by the clock, for a worker that waits and uses no time
STARTING = -1  # a worker's place before its first file
START_S = 300.0  # that a worker may take to import what it needs
LOOK_S = 0.1  # between looks at a worker
MAX_GROWTH_MIB = 32.0  # of a worker's resident memory over a run
MEMORY_LIMIT_BYTES = 6 * 2**30  # of a worker's addresses; what asks for more meets MemoryError, which is a fault
NUM_WARM = 2_000  # pictures before memory is first measured
NUM_BETWEEN = 500  # pictures between two measurements

Look = Callable[[bytes], str]  # at one file: returns an outcome, "images" or "bad_image_errors"


@dataclass
class Found:
    """What a run came to."""

    counts: dict[str, dict[str, int]]  # by kind of file and outcome
    growth_mib: float  # of the worker that grew most, between pictures, after its first ones
    peak_mib: float  # that a worker held at most, within a picture
    faults: list[str] = field(default_factory=list[str])  # one line each

    def total(self, outcome: str) -> int:
        return sum(counts[outcome] for counts in self.counts.values())


def main() -> None:
    """Fuzz as typed; exit 1 where there was a fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=10_000, help="files to make and decode")
    parser.add_argument("--start", type=int, default=0, help="index of the first one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--aside", type=Path, default=Path("fuzz_images"), help="folder for files that did harm")
    parser.add_argument("--out", type=Path, help="record to write, or to add to")
    typed = parser.parse_args()
    began = time.monotonic()
    stop = typed.start + typed.num
    found = fuzz(look, range(typed.start, stop), seed=typed.seed, num_workers=typed.workers, aside=typed.aside)
    show(found)
    if typed.out:
        write(typed.out, found, seed=typed.seed, start=typed.start, stop=stop, seconds=time.monotonic() - began)
    sys.exit(bool(found.faults))


# ---------------------------------------------------------------------------------------------------- in the worker


def look(content: bytes) -> str:
    """Decode one file; return what became of it. Raises: whatever is not allowed to come out of the decoder."""
    try:
        pixels = decode(content)
    except BadImageError as error:
        _check(len(str(error).splitlines()) == 1, f"a message of several lines: {error}")
        return "bad_image_errors"
    told = f"pixels of shape {pixels.shape} and type {pixels.dtype}"
    _check(pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] == 3 and pixels.size > 0, told)
    _check(pixels.shape[:2] == read_size(content), f"{told}, but the header says {read_size(content)}")
    return "images"


def _check(holds: bool, met: str) -> None:
    if not holds:
        raise AssertionError(met)


def _work(look: Look, share: range, seed: int, aside: Path, counts: Any, place: Any, memory_mib: Any) -> None:
    """Look at a share of the files, telling in shared memory which one it is at, what came out and what memory grew."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    warnings.simplefilter("always")
    warnings.showwarning = _refuse_warning
    for number, index in enumerate(share):
        place.value = index
        kind, content = make(seed, index)
        try:
            outcome = look(content)
        except Exception:
            outcome = "other_exceptions"
            keep(aside, index, kind, content, traceback.format_exc())
        counts[_slot(kind, outcome)] += 1
        if number >= NUM_WARM and number % NUM_BETWEEN == 0:
            now_mib = _resident_mib()
            memory_mib[0] = memory_mib[0] or now_mib
            memory_mib[1] = max(memory_mib[1], now_mib)
    memory_mib[2] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    place.value = share.stop


def _refuse_warning(message: Warning | str, category: type[Warning], *_: object) -> None:
    raise AssertionError(f"a warning got out: {category.__name__}: {message}")


def _resident_mib() -> float:
    """Return this process's resident memory, after giving back what malloc only holds in reserve."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if malloc_trim:
        malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def _slot(kind: str, outcome: str) -> int:
    return KINDS.index(kind) * len(OUTCOMES) + OUTCOMES.index(outcome)


def keep(aside: Path, index: int, kind: str, content: bytes, why: str) -> None:
    """Put a file that did harm where it can be looked at."""
    aside.mkdir(parents=True, exist_ok=True)
    (aside / f"{index}.{kind.lower()}").write_bytes(content)
    (aside / f"{index}.txt").write_text(why)


# ----------------------------------------------------------------------------------------------------- in the parent


class Worker:
    """A process that looks at a share of the files, and a new one after each that died."""

    def __init__(self, look: Look, share: range, seed: int, aside: Path, hang_s: float) -> None:
        self.look, self.share, self.seed, self.aside, self.hang_s = look, share, seed, aside, hang_s
        self.context = multiprocessing.get_context("spawn")
        self.counts = self.context.Array("q", len(KINDS) * len(OUTCOMES), lock=False)
        self.place = self.context.Value("q", STARTING, lock=False)  # index of the file it is at
        self.growth_mib = self.peak_mib = 0.0
        self._begin(share.start)

    def _begin(self, start: int) -> None:
        self.memory_mib = self.context.Array("d", 3, lock=False)  # at first, at most between pictures, within one
        self.place.value = STARTING
        share = range(start, self.share.stop)
        arguments = (self.look, share, self.seed, self.aside, self.counts, self.place, self.memory_mib)
        self.process: BaseProcess = self.context.Process(target=_work, args=arguments, daemon=True)
        self.process.start()
        self.seen, self.seen_at = self.place.value, self._now_s()

    def _now_s(self) -> tuple[float, float]:
        """Return the seconds of the clock and those that the worker has computed."""
        return time.monotonic(), processor_s(self.process.pid)

    def _hangs(self, index: int) -> bool:
        clock_s, computed_s = (now - then for now, then in zip(self._now_s(), self.seen_at, strict=True))
        if index not in self.share:  # it is starting, or ending
            return clock_s > START_S
        return computed_s > self.hang_s or clock_s > NUM_HANGS_ASLEEP * self.hang_s

    def watch(self) -> bool:
        """Return whether there is more to wait for; a worker that died or hangs gets a successor."""
        is_alive = self.process.is_alive()
        index = self.place.value  # read in this order: of a process that is dead it is the last
        if is_alive and index != self.seen:
            self.seen, self.seen_at = index, self._now_s()
        if is_alive and not self._hangs(index):
            return True
        self.growth_mib = max(self.growth_mib, self.memory_mib[1] - self.memory_mib[0])
        self.peak_mib = max(self.peak_mib, self.memory_mib[2])
        if not is_alive and index == self.share.stop:
            return False
        if index not in self.share:
            raise RuntimeError(f"A worker did not start, or died before its first file ({self.process.exitcode}).")
        self.process.kill()
        self.process.join()
        self._note("hangs" if is_alive else "crashes", index, self.process.exitcode)
        if index + 1 == self.share.stop:
            return False
        self._begin(index + 1)
        return True

    def _note(self, outcome: str, index: int, status: int | None) -> None:
        kind, content = make(self.seed, index)
        self.counts[_slot(kind, outcome)] += 1
        why = f"no answer in {self.hang_s:g} s" if outcome == "hangs" else f"exit status {status}"
        keep(self.aside, index, kind, content, why)


def processor_s(pid: int | None) -> float:
    """Return the seconds that a process has computed; 0 for one that is gone."""
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")


def fuzz(look: Look, indices: range, *, seed: int, num_workers: int, aside: Path, hang_s: float = HANG_S) -> Found:
    """Look at the files of these indices in worker processes, and outlive whatever happens to them."""
    bounds = [indices.start + len(indices) * number // num_workers for number in range(num_workers + 1)]
    shares = [range(start, stop) for start, stop in pairwise(bounds) if stop > start]
    before = set(aside.glob("*.txt"))
    workers = [Worker(look, share, seed, aside, hang_s) for share in shares]
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("pictures", total=len(indices))
        waiting = list(workers)
        while waiting:
            waiting = [worker for worker in waiting if worker.watch()]
            bar.update(task, completed=sum(sum(worker.counts) for worker in workers))
            time.sleep(LOOK_S)
    sums = np.sum([worker.counts[:] for worker in workers], axis=0).reshape(len(KINDS), -1).tolist()
    counts = {kind: dict(zip(OUTCOMES, row, strict=True)) for kind, row in zip(KINDS, sums, strict=True)}
    faults = [f"{path.stem}: {path.read_text().splitlines()[-1]}" for path in sorted(set(aside.glob("*.txt")) - before)]
    growth_mib = max((worker.growth_mib for worker in workers), default=0.0)
    if growth_mib > MAX_GROWTH_MIB:
        faults.append(f"memory grew by {growth_mib:.0f} MiB, allowed are {MAX_GROWTH_MIB:.0f}")
    return Found(counts, growth_mib, max((worker.peak_mib for worker in workers), default=0.0), faults)


# ------------------------------------------------------------------------------------------------------- afterwards


def show(found: Found) -> None:
    """Print the counts and the faults."""
    for kind, counts in found.counts.items():
        print(f"{kind:5}", ", ".join(f"{count:,} {outcome.replace('_', ' ')}" for outcome, count in counts.items()))
    print(
        f"memory grew by {found.growth_mib:.1f} MiB; at its highest, within a picture, it was {found.peak_mib:.0f} MiB"
    )
    for fault in found.faults:
        print(fault, file=sys.stderr)


def write(out: Path, found: Found, *, seed: int, start: int, stop: int, seconds: float) -> None:
    """Write the record of a run, or add it to the record of the piece before."""
    figures: dict[str, Any] = {
        "start": start,
        "stop": stop,
        "counts": found.counts,
        "totals": {outcome: found.total(outcome) for outcome in OUTCOMES},
        "peak_growth_mib": round(found.growth_mib, 1),
        "peak_memory_mib": round(found.peak_mib, 1),
        "faults": found.faults,
    }
    if out.is_file() and start:
        before = read_json(out)
        if before["seeds"] != [seed] or before["figures"]["stop"] != start:
            sys.exit(f"{out} ends at {before['figures']['stop']} of seeds {before['seeds']}. Give that as --start.")
        figures = _joined(before["figures"], figures)
        seconds += before["seconds"]
    write_record(out, kind="fuzz images", figures=figures, seeds=[seed], n=stop - figures["start"], seconds=seconds)


def _joined(one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any]:
    """Add up the figures of two pieces that follow each other."""

    def add(left: dict[str, int], right: dict[str, int]) -> dict[str, int]:
        return {name: left[name] + right[name] for name in left}

    return {
        "start": one["start"],
        "stop": two["stop"],
        "counts": {kind: add(one["counts"][kind], two["counts"][kind]) for kind in KINDS},
        "totals": add(one["totals"], two["totals"]),
        **{name: max(one[name], two[name]) for name in ("peak_growth_mib", "peak_memory_mib")},
        "faults": one["faults"] + two["faults"],
    }


if __name__ == "__main__":
    main()
