"""What is typed, read alike by every command: sizes, durations, flags that several have; how a stopped one ends."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from coatnet.config import FloatPrecision
from coatnet.errors import ConfigError

STOPPED = 130  # exit status after Ctrl-C, as shells have it

Json = Annotated[bool, Parameter(name="--json", negative="", help="Print one JSON object instead of text.")]
FloatPrecisionFlag = Annotated[
    FloatPrecision, Parameter(help="bf16 is faster where the processor has it; answers move a little.")
]
ScaleName = Literal["toy", "small", "medium", "paper"]  # rows of studies/scales.py, which help need not load
Device = Annotated[str, Parameter(help="cpu, cuda, cuda:0, mps, or auto for the best at hand.")]


def parse_duration_s(text: str) -> float:
    """Return seconds of "90", "90s", "20m" or "1.5h". Raises: ConfigError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip().lower())
    if match is None or float(match[1]) == 0:
        raise ConfigError(f"A time of '{text}' cannot be read. Give it like 90s, 20m or 1.5h.")
    return float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]]


def parse_size(text: str) -> tuple[int, int]:
    """Return (height, width) in px of "224" or "192x256". Raises: ConfigError."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text.strip().lower())
    if match is None or 0 in (int(match[1]), int(match[2] or match[1])):
        raise ConfigError(f"An image size of '{text}' cannot be read. Give it like 224 or 192x256 (height x width).")
    return int(match[1]), int(match[2] or match[1])


def print_json(value: Any) -> None:
    """Print one JSON value."""
    print(json.dumps(value, indent=2))
