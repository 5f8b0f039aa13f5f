"""What one answer is worth."""
from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """`vote` is what the text answers (None: nothing that counts, `invalid`), which the task's `same` compares;
    `scores` are the task's metrics, each between 0 and 1."""

    vote: Hashable | None
    scores: tuple[float, ...]
    invalid: bool = False
