"""Being asked to stop: Ctrl-C between updates, SIGTERM (Slurm, Kubernetes, spot machines) in evaluations too."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass


class StopAsked(Exception):  # noqa: N818 - nothing went wrong
    """Somebody asked to stop at once, and what was under way is given up."""


@dataclass
class StopRequest:
    """What somebody asked for; no update is ever cut in two for it."""

    asked: signal.Signals | None = None

    def look(self) -> None:
        """Raise StopAsked where the machine is about to go: the grace time is short."""
        if self.asked == signal.SIGTERM:
            raise StopAsked


@contextmanager
def listening() -> Generator[StopRequest]:
    """Note signals instead of ending at once; a second Ctrl-C ends at once."""
    request = StopRequest()

    def note(number: int, frame: object) -> None:  # noqa: ARG001 - the caller gives it
        request.asked = signal.Signals(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread hears signals
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
