"""What the rows of an epoch are made of: its examples in the order in which they are packed, window by window."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from hrm_megatron.config import ConfigError

BLOCK_EXAMPLES = 1 << 20  # at a time, so that temporary arrays stay small

Ints = np.ndarray  # [n] integers
Pair = tuple[np.ndarray, np.ndarray]  # prefix ids, target ids


class Window(NamedTuple):
    """Consecutive examples of an epoch: ids [n], and positions that each takes in a row [n]."""

    ids: Ints
    lengths: Ints


class Epoch(Protocol):
    """One epoch, loaded for planning."""

    def __len__(self) -> int: ...

    def window(self, start: int, stop: int) -> Window: ...


class Walk(Protocol):
    """Examples of epoch after epoch. What planning alone needs is loaded by `epoch` and goes with what it returns."""

    vocab_size: int
    id_dtype: np.dtype[np.unsignedinteger]

    def identity(self, epoch: int) -> str:
        """Name by content what decides the examples of an epoch, their lengths and their order."""

    def check(self, row_tokens: int) -> None:
        """Raise ConfigError if there is nothing to pack, or an example of any epoch that fits no row."""

    def epoch(self, epoch: int) -> Epoch: ...

    def example(self, epoch: int, i: int) -> Pair: ...

    def example_name(self, epoch: int, i: int) -> str: ...

    @property
    def size(self) -> int:
        """Examples of the data, about as many as an epoch has."""

    @property
    def folder(self) -> Path:
        """Where plans are kept, beside the data."""


def smallest_dtype(count: int) -> np.dtype[np.unsignedinteger]:
    """Unsigned integers that number `count` examples."""
    return np.dtype(np.uint32 if count <= 1 << 32 else np.uint64)


def blocks(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Cut a range of examples into blocks."""
    for first in range(start, stop, BLOCK_EXAMPLES):
        yield first, min(first + BLOCK_EXAMPLES, stop)


def row_lengths(prefixes: Ints, targets: Ints) -> Ints:
    """Positions that each example takes in a row, int32 [n]: the last target token is only a label."""
    found = np.empty(len(prefixes), np.int32)
    for start, stop in blocks(0, len(found)):
        block = slice(start, stop)
        np.subtract(prefixes[block] + targets[block], 1, out=found[block], casting="unsafe")
    return found


def check_lengths(lengths: Ints, row_tokens: int, name: Callable[[int], str], first: int = 0) -> None:
    """Refuse an empty list, and an example that fits no row; `name(first + i)` says which example the i-th is."""
    if not len(lengths):
        raise ConfigError("no examples to pack; check the input and --split")
    longest = int(np.argmax(lengths))
    if lengths[longest] > row_tokens:
        raise ConfigError(f"{name(first + longest)} takes {lengths[longest]} positions, more than a row of "
                          f"{row_tokens}; raise --seq-length, or preprocess again with --context-size {row_tokens}")
