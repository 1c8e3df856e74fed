"""Random draws that follow from (seed, stream, epoch, position) alone: no state to save, no rank or worker to know.

Source: the finaliser of SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

_MASK = 0xFFFF_FFFF_FFFF_FFFF
_GOLDEN = 0x9E37_79B9_7F4A_7C15


def _finalise(z: Any) -> Any:
    """Scramble 64 bits: a Python int, or a uint64 array, whose products wrap without a warning."""
    z = ((z ^ (z >> 30)) * 0xBF58_476D_1CE4_E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D0_49BB_1331_11EB) & _MASK
    return z ^ (z >> 31)


@lru_cache
def _root(seed: int, stream: str) -> int:
    """Return the 64 bits that stand for a seed and the name of a stream."""
    name = int.from_bytes(hashlib.sha256(stream.encode()).digest()[:8], "little")
    return _finalise((name + _GOLDEN * (seed + 1)) & _MASK)


def _key(root: int, epoch: Any, position: Any) -> Any:
    """Fold epoch and position into a root: ints to an int, uint64 arrays to a uint64 array."""
    folded = _finalise(((epoch ^ root) + _GOLDEN) & _MASK)
    return _finalise(((position ^ folded) + _GOLDEN) & _MASK)


def uniforms(seed: int, stream: str, epochs: IntArray | int, positions: IntArray | int, count: int) -> FloatArray:
    """Draw `count` numbers for each of B positions, each number in 0 <= x < 1.

    epochs, positions (B,) int64 or one int for all -> (B, count) float64
    """
    epochs_B, positions_B = np.broadcast_arrays(np.atleast_1d(epochs), np.atleast_1d(positions))
    keys_B = _key(_root(seed, stream), epochs_B.astype(np.uint64), positions_B.astype(np.uint64))
    counters = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    return (_finalise(keys_B[:, None] + counters) >> np.uint64(11)) * 2.0**-53


def generator(seed: int, stream: str, epoch: int, position: int) -> np.random.Generator:
    """Return a generator of its own for one position, where the number of draws is not known beforehand."""
    key = _key(_root(seed, stream), epoch, position)
    return np.random.Generator(np.random.Philox(key=key))


def first_uniforms(seed: int, stream: str, epochs: IntArray, positions: IntArray, count: int) -> FloatArray:
    """Return what the `generator` of each of B positions draws first: epochs, positions (B,) int64 -> (B, count)."""
    bits = np.random.Philox(key=0)
    rng, state = np.random.Generator(bits), bits.state
    keys_B = _key(_root(seed, stream), epochs.astype(np.uint64), positions.astype(np.uint64))
    found = np.empty((len(keys_B), count))
    for row, key in enumerate(keys_B):  # a new state costs less than a new generator
        state["state"]["key"][0] = key
        bits.state = state
        found[row] = rng.random(count)
    return found


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, n: int) -> IntArray:
    """Return the order of one epoch: each of 0 .. n-1 once, (n,) int64, read-only."""
    keys = _key(_root(seed, "order"), epoch, np.arange(n, dtype=np.uint64))
    order = np.argsort(keys, kind="stable").astype(np.int64)
    order.setflags(write=False)
    return order


def order(seed: int, n: int, start: int, stop: int) -> tuple[IntArray, IntArray]:
    """Return epoch and index of the positions start .. stop-1 of an order without end over n pictures.

    Position p belongs to epoch p // n and takes place p % n of that epoch's permutation -> two (stop - start,) int64
    """
    positions = np.arange(start, stop, dtype=np.int64)
    epochs = positions // n
    indices = np.empty_like(positions)
    for epoch in np.unique(epochs).tolist():
        here = epochs == epoch
        indices[here] = permutation(seed, epoch, n)[positions[here] % n]
    return epochs, indices
