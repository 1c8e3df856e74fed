"""The program in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def shell(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the program in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "coatnet", *arguments],
        capture_output=True, text=True, cwd=cwd, timeout=500, env={**os.environ, **environment}, check=False,
    )  # fmt: skip
