"""The few kinds of error a user can meet, and the hint for a misspelt name.

Each message says what was met, what is allowed and what to do, in one or two lines. The command line prints the
message alone; a program catches `CoatnetError`, or the kind it can handle.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from reprlib import Repr

NUM_LISTED = 24  # names that a message may list
NUM_SHOWN = 120  # characters of one value that a message may show

_BRIEF = Repr()
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = NUM_SHOWN


class CoatnetError(Exception):
    """Anything that went wrong for a reason a user can mend."""


class ConfigError(CoatnetError):
    """A setting that is unknown, out of range or at odds with another."""


class DataError(CoatnetError):
    """A data set that cannot be used: missing, empty, of one class, or of other classes than the model's."""


class BadImageError(DataError):
    """One file that is not an image that can be decoded within the limits."""


class ModelFileError(CoatnetError):
    """A model folder, checkpoint or weight file that is missing, damaged or does not fit."""


class SpoiltModelError(ModelFileError):
    """A network whose answers are no numbers."""


class TrainingError(CoatnetError):
    """A training run that cannot start or go on: the loss is not finite, or the run folder holds something else."""


class LostRankError(CoatnetError):
    """Another process of the group is gone in the middle of the work."""


def brief(value: object) -> str:
    """Return the repr of a value that anybody may have made up: one line, cut where it is long or deep."""
    return _BRIEF.repr(value)


def one_line(text: str) -> str:
    """Return a text that anybody may have made up, cut and escaped to one line."""
    return brief(text)[1:-1]


def name_hint(met: str, known: Iterable[str]) -> str:
    """Return "Did you mean 'x'?" for the known name nearest to what was met, or what there is where none is near."""
    known = list(known)
    near = get_close_matches(met[:NUM_SHOWN], known, n=1)
    if near:
        return f"Did you mean '{near[0]}'?"
    if len(known) > NUM_LISTED:
        return f"There are {len(known)}, such as {', '.join(known[:6])}."
    return f"There are: {', '.join(known)}."
