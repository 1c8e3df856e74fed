"""Each rank tells the others that it lives, and ends where one has not been heard for `SILENT_S`.

A killed process closes its connections, which the others notice at once. A machine that is cut off, or a process that
stands still, closes nothing: without this the others would wait for it until a time-out of half an hour. Ending is
right, since torchrun then starts the group again, and nobody can go on alone.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress
from typing import Protocol

BEAT_S = 2.0
SILENT_S = 30.0
GOODBYE = 1 << 40  # a counter so high tells that its rank left in good order


class Counters(Protocol):
    """Counters that all ranks share, by name; torch's TCPStore is one."""

    def add(self, key: str, amount: int, /) -> int: ...


class Heartbeat:
    """Two threads: one talks to the others, one sees to it that the talking has not got stuck."""

    def __init__(self, counters: Counters, rank: int, size: int, prefix: str) -> None:
        self._counters, self._rank = counters, rank
        self._keys = {other: f"{prefix}/{other}" for other in range(size)}
        self._left = threading.Event()
        self._heard_s = time.monotonic()  # when the talk with the counters last went well
        self._threads = [threading.Thread(target=part, daemon=True) for part in (self._talk, self._watch)]
        for thread in self._threads:
            thread.start()

    def leave(self) -> None:
        """Tell the others that this rank is done."""
        self._left.set()
        self._threads[0].join(BEAT_S)
        if not self._threads[0].is_alive():
            with suppress(RuntimeError):  # whoever keeps the counters has gone before
                self._counters.add(self._keys[self._rank], GOODBYE)

    def _talk(self) -> None:
        counts, news_s = dict.fromkeys(self._keys, 0), dict.fromkeys(self._keys, time.monotonic())
        while not self._left.wait(BEAT_S):
            now_s = time.monotonic()
            try:
                for other, key in self._keys.items():
                    count = self._counters.add(key, 1 if other == self._rank else 0)
                    if count != counts[other] or count >= GOODBYE:
                        counts[other], news_s[other] = count, now_s
            except RuntimeError as error:
                _end(f"rank {self._rank} has lost the others: {str(error).splitlines()[0]}")
            self._heard_s = now_s
            for other, heard_s in news_s.items():
                if now_s - heard_s > SILENT_S:
                    _end(f"rank {other} has not been heard by rank {self._rank} for {SILENT_S:.0f} s")

    def _watch(self) -> None:
        while not self._left.wait(BEAT_S):
            if time.monotonic() - self._heard_s > SILENT_S:
                _end(f"rank {self._rank} has not reached the others for {SILENT_S:.0f} s")


def _end(why: str) -> None:
    print(f"coatnet: {why}; ending, so that the group can start again.", file=sys.stderr, flush=True)
    os._exit(1)  # the main thread may wait for ever in an exchange
