"""What is typed as a time or a size, and what cannot be read."""

from __future__ import annotations

import re

import pytest

from coatnet.errors import ConfigError
from coatnet.typed import parse_duration_s, parse_size


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("20m", 1200), ("1.5h", 5400), (" 2 M ", 120), ("0.5s", 0.5), ("007", 7)],
)
def test_durations(text: str, seconds: float):
    assert parse_duration_s(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "0.0h", "-5m", "m", "1d", "1m30s", "1e3", "ten", "5 5"])
def test_what_is_no_duration(text: str):
    with pytest.raises(ConfigError, match=re.escape(f"A time of '{text}' cannot be read")):
        parse_duration_s(text)


@pytest.mark.parametrize(
    ("text", "size"), [("224", (224, 224)), ("192x256", (192, 256)), (" 96X128 ", (96, 128)), ("1", (1, 1))]
)
def test_sizes(text: str, size: tuple[int, int]):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "0x5", "5x0", "5x", "x5", "5x5x5", "-5", "2.5", "big", "5 5"])
def test_what_is_no_size(text: str):
    with pytest.raises(ConfigError, match=re.escape(f"An image size of '{text}' cannot be read")):
        parse_size(text)
