"""Kernels of our own for the network's inference and training, in C++ for x86 processors with AVX-512.

They are built when the package is installed, where a compiler is at hand; nothing else needs them. A plan is a table
of operations (`op.h`), made by `coatnet.fast.plan` or `operations`; `run` carries it out.
"""

from __future__ import annotations

import ctypes
import re
from collections import defaultdict
from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

HERE = Path(__file__).parent


class Op(ctypes.Structure):
    """One row of a plan; the fields are read off `op.h`, each 64 bits wide."""

    _fields_ = [
        (name.strip(" *"), ctypes.c_double if type_ == "double" else ctypes.c_int64)
        for type_, names in re.findall(
            r"^    (int64_t|double|const char|const float|char|float) (.+?);",
            (HERE / "op.h").read_text(encoding="utf-8"),
            re.MULTILINE,
        )
        for name in names.split(",")
    ]


def _members(enum: str) -> dict[str, int]:
    """Return the names of a C enum with their values."""
    found = re.search(rf"enum {enum} : int64_t {{(.+?)}};", (HERE / "op.h").read_text(encoding="utf-8"), re.DOTALL)
    assert found, f"op.h has no enum {enum}"
    return {name.strip(): number for number, name in enumerate(found[1].split(","))}


KINDS, TYPES, ACTS, RELATIVES = (_members(enum) for enum in ("Kind", "Type", "Act", "Relative"))


@cache
def _library() -> ctypes.CDLL | str:
    """Return the kernels, or why there are none."""
    for suffix in EXTENSION_SUFFIXES:
        path = HERE / f"_kernels{suffix}"
        if path.is_file():
            import_module("torch")  # its OpenMP runtime comes first, so that there is one pool of threads

            try:
                library = ctypes.CDLL(str(path))
            except OSError as error:
                return f"they cannot be loaded ({error})"
            library.coatnet_run.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
            library.coatnet_run.restype = None
            library.coatnet_round_trip.restype = ctypes.c_double
            return library
    return "the package was installed without a C++ compiler"


def missing(precision: str) -> str | None:
    """Return why the kernels cannot compute in this precision here, or None if they can."""
    library = _library()
    if isinstance(library, str):
        return library
    found = library.coatnet_supports()
    needed, name = {"fp32": (1, "AVX-512"), "bf16": (2, "AVX-512 BF16"), "int8": (6, "AVX-512 BF16 and VNNI")}[
        precision
    ]
    return None if found & needed == needed else f"this processor has no {name}"


def run(ops: ctypes.Array[Op], num_threads: int) -> None:
    """Carry out the operations in order."""
    library = _library()
    assert not isinstance(library, str), "ask `missing` first"
    found = _profile
    seconds = None if found is None else (ctypes.c_double * len(ops))()
    library.coatnet_run(ctypes.addressof(ops), len(ops), num_threads, ctypes.addressof(seconds) if seconds else None)
    if found is not None and seconds is not None:
        kinds = {number: kind for kind, number in KINDS.items()}
        for op, took_s in zip(ops, seconds, strict=True):
            found[kinds[op.kind]] += took_s


def round_trip_s() -> float | None:
    """Return how long a cache line takes from one core to another and back; None where that cannot be measured."""
    library = _library()
    return None if isinstance(library, str) else library.coatnet_round_trip() or None


_profile: defaultdict[str, float] | None = None


@contextmanager
def profiled() -> Generator[dict[str, float]]:
    """Sum the seconds that the kernels take meanwhile by kind, in this whole process; one profile at a time."""
    global _profile
    _profile = defaultdict(float)
    try:
        yield _profile
    finally:
        _profile = None
