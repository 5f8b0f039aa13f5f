"""Read numpy's .npy files, whatever damage is in them."""
from __future__ import annotations

from pathlib import Path

import numpy as np


class UnreadableArray(ValueError):
    """A .npy file that cannot be read: one line with its path and the reason, without a way out."""


def load_array(path: Path) -> np.ndarray:
    """Return the array of a .npy file, memory-mapped and read-only.

    Raises UnreadableArray: over a damaged header numpy's reader may raise anything, even errors of Python's tokenizer.
    """
    try:
        return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UnreadableArray(f"{path}: cannot read ({next(iter(reason.splitlines()), type(error).__name__)})"
                              ) from error
