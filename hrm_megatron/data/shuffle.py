"""Orders that a seed decides for good: permutations computed element by element, without memory.

Integer arithmetic and numpy's SeedSequence, both promised for good, are all they rest on, so that an order is the same
with every release of numpy and numba and on every machine.
"""
from __future__ import annotations

import numpy as np

Ints = np.ndarray  # [n] integers


def stream_key(*numbers: int) -> np.uint64:
    """Mix numbers (seed, epoch, ...) into the 64 bits that a permutation is computed from."""
    return np.uint64(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
