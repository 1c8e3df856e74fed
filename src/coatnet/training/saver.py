"""Checkpoints written beside the training: a copy is taken at once, the disk sees it while updates go on.

A disk that fails or is full costs the checkpoint, never the run: half of it is removed again, the last good one stays,
and the next is tried in its time.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from safetensors import SafetensorError

from coatnet.training.checkpoint import Retention, Snapshot, State, take, write

DISK_ERRORS = (OSError, SafetensorError)  # the latter is what safetensors makes of the former


class Saver:
    """Writes one run's checkpoints, one at a time; `tell` hears in the caller's thread what went wrong.

    A copy is written once the next update has shown that its weights give numbers, so that a checkpoint is a good one.
    """

    def __init__(self, run: Path, retention: Retention, tell: Callable[[str], None]) -> None:
        self._run, self.retention, self._tell = run, retention, tell
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[Path] | None = None
        self._copy: Snapshot | None = None  # its memory takes the next copy
        self._is_unproven = False

    def save(self, state: State, *, at_once: bool = False) -> None:
        """Copy the state, to be written by `look`, or `at_once`; wait before for a write that is still under way."""
        self.wait()
        state.num_saves += 1
        self._copy = take(state, reuse=self._copy)
        self._is_unproven = True
        if at_once:
            self._write()

    def look(self, *, is_good: bool) -> None:
        """Hear whether an update after the copy was good, and have it written; tell of a write that failed."""
        if self._is_unproven and is_good:
            self._write()
        self._is_unproven = False
        if self._writing is not None and self._writing.done():
            self.wait()

    def _write(self) -> None:
        assert self._copy is not None
        self._is_unproven = False
        self._writing = self._pool.submit(write, self._run, self._copy, self.retention)

    def wait(self) -> None:
        """Return when nothing is being written any more."""
        writing, self._writing = self._writing, None
        try:
            if writing is not None:
                writing.result()
        except DISK_ERRORS as error:
            assert self._copy is not None
            self._tell(could_not_write(f"the checkpoint of step {self._copy.step}", self._run, error))

    def close(self) -> None:
        """Write what is left to write, whole."""
        if self._is_unproven:
            self._write()
        self.wait()
        self._pool.shutdown()


def could_not_write(what: str, where: Path, error: Exception) -> str:
    """Say what was lost and what to do."""
    try:
        free = f"{shutil.disk_usage(where).free / 2**20:,.0f} MiB are free there"
    except OSError:
        free = "the folder cannot be reached"
    return (
        f"{what} could not be written to {where} ({error}; {free}). Training goes on, what was "
        "written before stays. Make room or mend the disk; it is tried again in its time."
    )
