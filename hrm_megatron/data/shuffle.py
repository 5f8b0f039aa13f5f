"""Permutations that depend on a seed alone, computed element by element without storing them.

They rest only on integer arithmetic and numpy's SeedSequence, whose results are guaranteed stable, so an order is the
same with every release of numpy and numba and on every machine.
"""
from __future__ import annotations

import numpy as np

Ints = np.ndarray  # [n] integers


def stream_key(*numbers: int) -> np.uint64:
    """Hash numbers (seed, epoch, ...) to the 64-bit key of a permutation."""
    return np.uint64(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
