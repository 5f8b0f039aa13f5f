"""Assign examples to rows by the seed alone: the same rows for any number of loader workers.

Every epoch is a walk over its examples (`walk.py`), cut into windows; each window is packed by best-fit decreasing, and
its rows are shuffled. A row never mixes epochs. This module does not use torch.
"""
from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hrm_megatron.data.plan_cache import PlanCache, Rows
from hrm_megatron.data.shuffle import Ints, stream_key
from hrm_megatron.data.walk import Epoch, Walk

log = logging.getLogger(__name__)

WINDOW_EXAMPLES = 16_384  # at least; longer rows need more, so that a window's last, half-empty row is negligible
WINDOW_ROW_LENGTHS = 4  # window examples per position of a row
# Raise it when a change moves any example: cached plans must become invalid, and no run may resume in the middle of
# another order (training/resume.py). Version 1 ordered by sorting, in windows of one size.
PLAN_VERSION = 2
EPOCHS_IN_MEMORY = 2


class Place(NamedTuple):
    """The epoch of a planned row, and its example ids."""

    epoch: int
    example_ids: Ints


def row_length(prefix_length: int, target_length: int) -> int:
    """Return the positions that an example takes in a row: its last target token is only a label."""
    return prefix_length + target_length - 1


def window_for(row_tokens: int) -> int:
    """Return the number of examples that are packed together."""
    return max(WINDOW_EXAMPLES, WINDOW_ROW_LENGTHS * row_tokens)


def plan_windows(epoch: Epoch, row_tokens: int, window_examples: int, *seed: int) -> Iterator[tuple[Ints, Ints, int]]:
    """Yield per window the ids row by row, the number of examples of each row, and the positions filled in all."""
    from hrm_megatron.data.kernels import best_fit, group_by_row

    for start in range(0, len(epoch), window_examples):
        window = epoch.window(start, min(start + window_examples, len(epoch)))
        row_of, rows = best_fit(window.lengths, row_tokens)
        # Best fit places long examples first; without the shuffle a batch would hold only long or only short ones.
        ids, sizes = group_by_row(window.ids, row_of, rows, stream_key(*seed, start, 1))
        yield ids, sizes, int(window.lengths.sum(dtype=np.int64))


def warm_up(id_dtype: np.dtype[np.unsignedinteger]) -> None:
    """Compile all kernels that planning calls."""
    from hrm_megatron.data.kernels import best_fit, draw, gather, group_by_row

    one, key = np.ones(1, np.int64), stream_key(0)
    ids, lengths = one.astype(id_dtype), one.astype(np.int32)
    gather(one.view(np.uint64), draw(0, 1, 0, key, np.arange(2), one, one, np.zeros(1, np.uint64)) - 1, 1, ids, lengths)
    group_by_row(ids, best_fit(one.astype(np.int32), 1)[0], 1, key)


class RowPlan:
    """Rows 0, 1, 2, ... over any number of epochs; each epoch is planned when it is first needed.

    With a `cache_folder`, planned epochs are stored there and memory-mapped by all processes that see it; one of them
    plans, the others wait. A thread then plans the next epoch ahead, if it has a row before `num_rows`.
    """

    def __init__(self, walk: Walk, row_tokens: int, seed: int, cache_folder: str | Path | None = None,
                 window_examples: int | None = None, num_rows: int = 0) -> None:
        self.walk = walk
        self.row_tokens = row_tokens
        self.seed = seed
        self.window_examples = window_examples or window_for(row_tokens)
        self.num_rows = num_rows
        self._cache = PlanCache(Path(cache_folder)) if cache_folder else None
        self._first_rows = [0]  # first row of every epoch counted so far, and of the next one
        self._recent: dict[int, Rows] = {}
        self._entered: set[int] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Drop loaded rows and the record of epochs planned ahead: a copy in another process maps rows itself."""
        return self.__dict__ | {"_entered": set()} | ({"_recent": {}} if self._cache else {})

    def rows_of_epoch(self, epoch: int) -> Rows:
        """Return the rows of one epoch."""
        if epoch not in self._recent:
            rows = self._cache.opened(self._name(epoch), self._plan(epoch)) if self._cache else (
                Rows.gathered(self._plan(epoch)()))
            self._recent = dict([*self._recent.items(), (epoch, rows)][-EPOCHS_IN_MEMORY:])
        return self._recent[epoch]

    def locate(self, row: int) -> Place:
        """Return epoch and example ids of row number `row`. Of earlier epochs only the number of rows is read."""
        while self._first_rows[-1] <= row:
            self._first_rows.append(self._first_rows[-1] + self._count(len(self._first_rows) - 1))
        epoch = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        if self._cache and epoch not in self._entered and self._first_rows[epoch + 1] < self.num_rows:
            warm_up(self.walk.id_dtype)  # a loader worker must not fork during an import or a compilation
            self._cache.plan_ahead(self._name(epoch + 1), self._plan(epoch + 1))
        self._entered.add(epoch)
        return Place(epoch, self.rows_of_epoch(epoch)[row - self._first_rows[epoch]])

    def _count(self, epoch: int) -> int:
        if self._cache and (count := self._cache.num_rows(self._name(epoch))) is not None:
            return count
        return len(self.rows_of_epoch(epoch))

    def _name(self, epoch: int) -> str:
        key = (PLAN_VERSION, self.walk.identity(epoch), self.row_tokens, self.seed, epoch, self.window_examples)
        return f"rows-{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}"

    def _plan(self, epoch: int) -> Planner:
        return Planner(self.walk, epoch, self.row_tokens, self.seed, self.window_examples)


@dataclass(frozen=True)
class Planner:
    """Plans one epoch when called."""

    walk: Walk
    epoch: int
    row_tokens: int
    seed: int
    window_examples: int

    def __call__(self) -> Iterator[tuple[Ints, Ints, int]]:
        if not self.epoch:
            self.walk.check(self.row_tokens)  # checks all epochs: a bad late one must not end a run after days
        loaded = self.walk.epoch(self.epoch)
        if len(loaded) > self.window_examples:
            log.info("data: planning the rows of %d examples, epoch %d", len(loaded), self.epoch)
        yield from plan_windows(loaded, self.row_tokens, self.window_examples, self.seed, self.epoch)
