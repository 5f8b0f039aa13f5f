"""Which examples share a row, decided once from the seed: the same rows for any number of readers.

Every epoch is a shuffled walk over all examples, cut into windows; each window is packed by best fit, longest
example first, and its rows are shuffled. A row never mixes epochs. Only numpy: nothing here knows a tensor.
"""
from __future__ import annotations

import hashlib
import shutil
import uuid
from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hrm_megatron.config import ConfigError
from hrm_megatron.program import listening, signals_held

WINDOW_EXAMPLES = 16_384  # wide enough that a window's last, half-empty row does not count
PLAN_VERSION = 1  # raise it when a change moves an example: cached plans must not survive
EPOCHS_IN_MEMORY = 2
ROW_ARRAYS = ("offsets", "example_ids")  # files of a cached plan

Ints = np.ndarray  # [n] integers


@dataclass(frozen=True)
class Rows:
    """Row i holds `example_ids[offsets[i]:offsets[i + 1]]`, in that order."""

    offsets: Ints
    example_ids: Ints

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> Ints:
        return self.example_ids[self.offsets[row]:self.offsets[row + 1]]


class Place(NamedTuple):
    """Where a planned row comes from."""

    epoch: int
    example_ids: Ints


def row_length(prefix_length: int, target_length: int) -> int:
    """Positions that an example takes in a row: its last target token is only a label."""
    return prefix_length + target_length - 1


def random_order(count: int, *key: int) -> Ints:
    """Permute range(count) by the numbers of `key`.

    Sorted raw Philox output, because numpy promises that stream for good; `permutation` may change between releases.
    """
    raw = np.random.Philox(np.random.SeedSequence(key)).random_raw(count)
    return np.argsort(raw, kind="stable")


def shuffled_order(count: int, seed: int, epoch: int) -> Ints:
    """Order in which an epoch walks over its examples."""
    return random_order(count, seed, epoch)


def check_lengths(lengths: Ints, row_tokens: int) -> None:
    """Refuse an empty list, and an example that fits no row."""
    if not len(lengths):
        raise ConfigError("no examples to pack; check the input and --split")
    longest = int(np.argmax(lengths))
    if lengths[longest] > row_tokens:
        raise ConfigError(f"example {longest} takes {lengths[longest]} positions, more than a row of {row_tokens}; "
                          f"raise --seq-length, or preprocess again with --context-size {row_tokens}")


def best_fit(lengths: Ints, row_tokens: int) -> Ints:
    """Row of each example [n]: longest first, each into the fullest row that still has room."""
    count, shortest = len(lengths), int(lengths.min())
    row_of = np.empty(count, np.int64)
    rooms: list[int] = []  # room * count + row of every row that can still take something, ascending
    opened = 0
    by_length = np.argsort(-lengths, kind="stable")
    for example, length in zip(by_length.tolist(), lengths[by_length].tolist(), strict=True):
        at = bisect_left(rooms, length * count)
        if at < len(rooms):
            room, row = divmod(rooms.pop(at), count)
        else:
            room, row = row_tokens, opened
            opened += 1
        row_of[example] = row
        if room - length >= shortest:
            insort(rooms, (room - length) * count + row)
    return row_of


def plan_epoch(lengths: Ints, row_tokens: int, order: Ints, seed: int, epoch: int = 0,
               window_examples: int = WINDOW_EXAMPLES) -> Rows:
    """Pack the examples of one epoch, taken in `order`, into rows of `row_tokens` positions.

    `lengths[i]` are the positions of example i; `order` is a permutation of all ids.
    """
    check_lengths(lengths, row_tokens)
    ids, sizes = [], []
    for start in range(0, len(order), window_examples):
        window = order[start:start + window_examples]
        row_of = best_fit(lengths[window], row_tokens)
        # Best fit fills long rows first; without this, a batch would be all long or all short examples.
        row_of = random_order(int(row_of.max()) + 1, seed, epoch, start, 1)[row_of]
        ids.append(window[np.argsort(row_of, kind="stable")])
        sizes.append(np.bincount(row_of))
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(sizes))])
    return Rows(offsets, np.concatenate(ids))


class RowPlan:
    """Rows 0, 1, 2, ... over as many epochs as anybody asks for, planned epoch by epoch when first needed.

    `epoch_lengths(epoch)` returns the positions of each example of that epoch. `shuffle=False` keeps their order
    (before packing). With a `cache_folder`, planned epochs are kept there and opened as memory maps.
    """

    def __init__(self, epoch_lengths: Callable[[int], Ints], row_tokens: int, seed: int, shuffle: bool = True,
                 cache_folder: str | Path | None = None, window_examples: int = WINDOW_EXAMPLES) -> None:
        self.epoch_lengths = epoch_lengths
        self.row_tokens = row_tokens
        self.seed = seed
        self.shuffle = shuffle
        self.window_examples = window_examples
        self.cache_folder = Path(cache_folder) if cache_folder else None
        self._first_rows = [0]  # of every planned epoch, and of the next one
        self._recent: dict[int, Rows] = {}

    def rows_of_epoch(self, epoch: int) -> Rows:
        """Return the rows of one epoch; example ids are positions in `epoch_lengths(epoch)`."""
        if epoch not in self._recent:
            rows = self._planned(epoch)
            self._recent = dict([*self._recent.items(), (epoch, rows)][-EPOCHS_IN_MEMORY:])
        return self._recent[epoch]

    def locate(self, row: int) -> Place:
        """Find row number `row` of the whole walk."""
        while self._first_rows[-1] <= row:
            self._first_rows.append(self._first_rows[-1] + len(self.rows_of_epoch(len(self._first_rows) - 1)))
        epoch = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        return Place(epoch, self.rows_of_epoch(epoch)[row - self._first_rows[epoch]])

    def _planned(self, epoch: int) -> Rows:
        lengths = np.ascontiguousarray(self.epoch_lengths(epoch), np.int64)
        if self.cache_folder is None:
            return self._plan(lengths, epoch)
        key = (PLAN_VERSION, hashlib.sha256(lengths).hexdigest(), self.row_tokens, self.seed, epoch, self.shuffle,
               self.window_examples)
        folder = self.cache_folder / f"rows-{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}"
        if not folder.exists():
            _save(self._plan(lengths, epoch), folder)
        return _load(folder)

    def _plan(self, lengths: Ints, epoch: int) -> Rows:
        order = shuffled_order(len(lengths), self.seed, epoch) if self.shuffle else np.arange(len(lengths))
        return plan_epoch(lengths, self.row_tokens, order, self.seed, epoch, self.window_examples)


@listening()
def _save(rows: Rows, folder: Path) -> None:
    """Write a planned epoch so that other processes see all of it or nothing."""
    partial = folder.with_name(f"{folder.name}.partial-{uuid.uuid4().hex}")
    try:
        partial.mkdir(parents=True)
        for name in ROW_ARRAYS:
            np.save(partial / f"{name}.npy", getattr(rows, name), allow_pickle=False)
        partial.rename(folder)
    except OSError as error:
        if not folder.exists():  # else another process was faster, with the same rows
            raise ConfigError(f"{folder}: cannot keep the packing plan ({error.strerror}); choose another "
                              "--data-cache-path") from error
    finally:
        with signals_held():
            shutil.rmtree(partial, ignore_errors=True)


def _load(folder: Path) -> Rows:
    try:
        return Rows(*(np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ROW_ARRAYS))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: damaged packing plan ({error}); delete that folder") from error
