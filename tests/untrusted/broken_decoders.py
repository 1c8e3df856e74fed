"""Decoders with the faults that the fuzz run is to find; its worker processes import them."""

from __future__ import annotations

import os
import signal
import time

from image_mutations import make

CRASHES, LOOPS, SLEEPS, RAISES = (3, 8, 11, 17)  # indices of the files that bring them out
_CONTENT = {make(0, index)[1]: index for index in (CRASHES, LOOPS, SLEEPS, RAISES)}
_LEAK: list[bytes] = []


def with_every_fault(content: bytes) -> str:
    """Do what the file is known to bring out."""
    index = _CONTENT.get(content)
    if index == CRASHES:
        os.kill(os.getpid(), signal.SIGSEGV)
    while index == LOOPS:
        pass
    if index == SLEEPS:
        time.sleep(3600)
    if index == RAISES:
        raise KeyError("no such palette")
    return "images"


def with_a_leak(content: bytes) -> str:
    """Keep 128 KiB of each picture."""
    _LEAK.append(content[:1] * 2**17)
    return "images"
