"""Memory that stays with the process between updates, on glibc.

An activation of a few tens of MiB is mapped anew for each update, and the system clears each of its pages again. Kept
by the allocator it is neither: an update of `coatnet_0` in bf16 takes about a tenth less, and no more memory at its
peak (docs/log.md).
"""

from __future__ import annotations

import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # mallopt's names for what it sets
NEVER_TRIMMED = 2**31 - 1  # bytes free at the end of the heap before they are given back
MAPPED_FROM = 2**30  # bytes of a single block


def keep_freed_memory() -> bool:
    """Have malloc keep what it is given back, for the whole process; return whether this C library can."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # another C library; no such thing as None on Windows
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, MAPPED_FROM)) and bool(mallopt(M_TRIM_THRESHOLD, NEVER_TRIMMED))
