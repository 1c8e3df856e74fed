"""The few kinds of error a user can meet.

Each message says what was met, what is allowed and what to do, in one or two lines. The command line prints the
message alone; a program catches `CoatnetError`, or the kind it can handle.
"""

from __future__ import annotations


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


class TrainingError(CoatnetError):
    """A training run that cannot start or go on: the loss is not finite, or the run folder is in use."""
