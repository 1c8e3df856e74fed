"""Real `coatnet train` processes on small pictures: started, watched, killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

QUICK = ("--model", "coatnet_pico", "--batch-size", "12", "--device", "cpu", "--checkpoint-every", "0.2s")
HARD = (*QUICK, "--stochastic-depth", "0.2", "--mixup", "0.8", "--ema-decay", "0.9")
TIMEOUT_S = 300


def command(data: Path, run: Path, *flags: str) -> list[str]:
    return [sys.executable, "-m", "coatnet", "train", str(data), "--out", str(run), *flags]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "200", **more}


def finish(words: Sequence[str], **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, env=environment(**more), capture_output=True, text=True, check=False, timeout=TIMEOUT_S
    )


def kill_after(words: Sequence[str], run: Path, seconds: float, number: signal.Signals = signal.SIGKILL) -> int:
    """Start a command, send a signal so long after its run folder is begun, and return how it ended."""
    with subprocess.Popen(words, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        begun = run / "run_manifest.json"
        while not begun.exists() and process.poll() is None:
            time.sleep(0.01)
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(number)
        return process.wait(TIMEOUT_S)
