"""How much memory something takes at its peak: of the device, or of this process."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch

PROCESS = Path("/proc/self")


def peak_mib(call: Callable[[], object], device: torch.device) -> float | None:
    """Run `call` and return by how many MiB memory grew at its highest; None where the system does not tell.

    On a card the second of two calls counts: the first may compile, and tries kernels out on memory of its own.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    try:
        (PROCESS / "clear_refs").write_text("5")  # the highest mark starts again from what is resident now
    except OSError:
        call()
        return None
    before = _status_mib("VmRSS")
    call()
    return _status_mib("VmHWM") - before


def _status_mib(name: str) -> float:
    found = re.search(rf"^{name}:\s+(\d+) kB", (PROCESS / "status").read_text(), re.MULTILINE)
    assert found, f"/proc/self/status has no {name}"
    return int(found[1]) / 1024
