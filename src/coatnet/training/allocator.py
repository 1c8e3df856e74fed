"""Memory that stays with the process between updates, on glibc.

An activation of a few tens of MiB is mapped anew for each update, and the system clears each of its pages again. Kept
by the allocator it is neither: an update of `coatnet_0` in bf16 takes about a tenth less, and no more memory at its
peak (docs/log.md). With activation checkpointing it does take more: what is freed between two segments is of other
sizes than what comes next. Whoever asks for that gives time for memory, so large blocks go back at once.
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt's names for what it sets
NEVER_TRIMMED = 2**31 - 1  # bytes free at the end of the heap before they are given back
KEPT_BELOW, KEPT_BELOW_WHEN_SPARING = 2**30, 2**22  # bytes of a single block
KEPT_BELOW_WHERE_OLD = 2**25  # the most that an older glibc takes


def keep_freed_memory(*, sparing: bool = False) -> bool:
    """Have malloc keep what it is given back, for the whole process, or with `sparing` only the smaller blocks.

    Returns whether this C library can.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library; no such thing as None on Windows
        return False
    below = KEPT_BELOW_WHEN_SPARING if sparing else KEPT_BELOW
    keeps = mallopt(M_MMAP_THRESHOLD, below) or mallopt(M_MMAP_THRESHOLD, KEPT_BELOW_WHERE_OLD)
    return bool(mallopt(M_TRIM_THRESHOLD, NEVER_TRIMMED)) and bool(keeps)
