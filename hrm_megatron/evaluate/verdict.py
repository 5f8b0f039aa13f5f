"""The score of one answer."""
from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """`vote` is the extracted answer, which the task's `same` compares (None: none to vote for); `scores` are the
    task's metrics, each between 0 and 1; `invalid`: not an answer in the task's form."""

    vote: Hashable | None
    scores: tuple[float, ...]
    invalid: bool = False
