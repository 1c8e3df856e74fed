"""One JSON record a run: what ran, where, with which versions and seeds, and the figures that came out.

A record tells nothing of whose machine it was: no host or user names, and paths are cut to what lies below the working
folder, or to their last part.
"""

from __future__ import annotations

import math
import os
import platform
import re
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from coatnet import __version__
from coatnet.files import write_json

PACKAGES = ("torch", "torchvision", "numpy", "timm", "onnxruntime", "openvino", "nncf", "webdataset", "datasets")
TOOL_TIMEOUT_S = 10  # for git and the card's own tool to answer


def environment() -> dict[str, Any]:
    """Return what a run depends on besides its config, as plain JSON data."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command(),
        "commit": _commit(),
        "host": _host(),
        "versions": {
            "coatnet": __version__,
            "python": platform.python_version(),
            **{name: _version(name) for name in PACKAGES},
        },
    }


def write_record(path: Path, **facts: Any) -> dict[str, Any]:
    """Write one run's record, as `make_record` makes it, atomically, and return it."""
    record = make_record(**facts)
    write_json(path, record)
    return record


def make_record(
    *,
    kind: str,
    figures: dict[str, Any],
    seeds: list[int],
    n: int,
    seconds: float,
    config: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return one run's record as plain JSON data; `n` is the number of measurements or pictures behind each figure.

    Numbers that are not finite become null, since JSON has none.
    """
    record: dict[str, Any] = {"kind": kind, **environment(), "seeds": seeds, "n": n, "seconds": round(seconds, 3)}
    if config is not None:
        record["config"] = config
    return _plain({**record, "figures": figures})


def _command() -> list[str]:
    """Return the command as one would type it, under torchrun too."""
    program = Path(sys.argv[0])
    words = [program.name]
    if program.name == "__main__.py":
        num_ranks = os.environ.get("WORLD_SIZE", "1")
        torchrun = ["torchrun", "--standalone", "--nproc-per-node", num_ranks]
        words = [*(["python"] if num_ranks == "1" else torchrun), "-m", program.parent.name]
    return words + [_shorten(argument) for argument in sys.argv[1:]]


def _shorten(text: str) -> str:
    """Cut an absolute path, alone or after `option=`, to its part below the working folder or to its last part."""
    option, equals, value = text.partition("=")
    if not equals:
        option, value = "", text
    if value == "~":  # no more than a sign, as in "A ~ B"; in full it would tell whose home it is
        return text
    path = Path(os.path.expanduser(value))  # noqa: PTH111 - Path's raises where it knows no such user
    if not path.is_absolute():
        return text
    inside = path.is_relative_to(Path.cwd())
    return option + equals + (path.relative_to(Path.cwd()).as_posix() if inside else path.name)


def _commit() -> str | None:
    """Return the commit of the code that runs, None if it is no checkout of ours.

    It ends in `-dirty` where the code differs from it; a record that was just written beside it does not count.
    """
    here = Path(__file__).resolve()
    top = _git(here.parent, "rev-parse", "--show-toplevel")
    # An installed copy may lie inside some other repository, whose commit would say nothing about us.
    if top is None or Path(top).resolve() / "src" / "coatnet" / here.name != here:
        return None
    head = _git(here.parent, "rev-parse", "HEAD")
    changed = _git(here.parent, "status", "--porcelain", "--untracked-files=no", "--", ".")
    return f"{head}-dirty" if head and changed else head


def _git(folder: Path, *arguments: str) -> str | None:
    return _said_by("git", *arguments, folder=folder)


def _said_by(*command: str, folder: Path | None = None) -> str | None:
    """Return what a program prints, or None where it is missing, fails or says nothing."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TOOL_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _host() -> dict[str, Any]:
    import torch  # the family and the help start without it

    return {
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": _memory_gib(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **(_card() if torch.cuda.is_available() else {}),
    }


def _card() -> dict[str, Any]:
    """Return what the figures of a card depend on besides its name."""
    import torch

    driver = _said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")  # a line for each card
    return {
        "gpu_memory_gib": round(torch.cuda.get_device_properties().total_memory / 2**30, 1),
        "gpu_driver": driver.splitlines()[0] if driver else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": _version("triton"),
    }


def _cpu_model() -> str | None:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or None


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (AttributeError, ValueError, OSError):  # no such names outside Unix
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _plain(value: Any) -> Any:
    """Return data that JSON can hold: paths shortened, no NaN or infinity, NumPy's and torch's numbers as Python's."""
    if isinstance(value, dict):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, Path):
        return _shorten(str(value))
    if isinstance(value, str):
        return _shorten(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return _plain(value.item()) if hasattr(value, "item") else value
