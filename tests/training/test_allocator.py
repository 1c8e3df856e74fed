"""What malloc keeps is not asked of the system again."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from coatnet.training.allocator import keep_freed_memory
if sys.argv[1] != "plain":
    assert keep_freed_memory(sparing=sys.argv[1] == "spare")
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the setting is glibc's")
def test_pages_are_cleared_once():
    faults = {}
    for word in ("keep", "spare", "plain"):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, word], capture_output=True, text=True, check=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        faults[word] = int(done.stdout)
    assert faults["keep"] * 10 < min(faults["plain"], faults["spare"]), faults
