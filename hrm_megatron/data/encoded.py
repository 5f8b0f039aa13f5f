"""The result that a worker returns for a piece of its input."""
from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from hrm_megatron.data.example import BadRow
from hrm_megatron.data.lint import Lint
from hrm_megatron.data.shards import KEY


@dataclass
class Encoded:
    """Ids of a piece's examples: prefix, target, prefix, target, ... in `ids`, with `lengths` [examples, 2]; the keys
    of their texts, [examples] and [examples, 2]. `noted`: events during reading that are reported, counted by kind."""

    ids: np.ndarray
    lengths: np.ndarray
    truncated: int = 0
    defaulted: int = 0
    bad_rows: list[BadRow] = field(default_factory=list)
    noted: Counter[str] = field(default_factory=Counter)
    lint: Lint = field(default_factory=Lint)
    prompt_keys: np.ndarray = field(default_factory=lambda: np.empty(0, KEY))
    example_keys: np.ndarray = field(default_factory=lambda: np.empty((0, 2), KEY))
