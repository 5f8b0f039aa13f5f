"""The examples of one epoch in packing order, window by window."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from hrm_megatron.config import ConfigError

BLOCK_EXAMPLES = 1 << 20  # processed at a time, so that temporary arrays stay small

Ints = np.ndarray  # [n] integers
Pair = tuple[np.ndarray, np.ndarray]  # prefix ids, target ids


class Window(NamedTuple):
    """Consecutive examples of an epoch: ids [n], and the positions that each takes in a row [n]."""

    ids: Ints
    lengths: Ints


class Epoch(Protocol):
    """One epoch, loaded for planning."""

    def __len__(self) -> int: ...

    def window(self, start: int, stop: int) -> Window: ...


class Walk(Protocol):
    """The examples of successive epochs. What only planning needs is loaded by `epoch`, into its result."""

    vocab_size: int
    id_dtype: np.dtype[np.unsignedinteger]

    def identity(self, epoch: int) -> str:
        """Return a content-based name of all that decides the examples of an epoch, their lengths and order."""

    def check(self, row_tokens: int) -> None:
        """Raise ConfigError if there is nothing to pack, or if an example of any epoch is longer than a row."""

    def epoch(self, epoch: int) -> Epoch: ...

    def example(self, epoch: int, i: int) -> Pair: ...

    def example_name(self, epoch: int, i: int) -> str: ...

    @property
    def size(self) -> int:
        """Number of examples in the data, about as many as an epoch has."""

    @property
    def folder(self) -> Path:
        """Default folder for cached plans, beside the data."""


def smallest_dtype(count: int) -> np.dtype[np.unsignedinteger]:
    """Return the smallest unsigned dtype (at least 32 bits) that can number `count` examples."""
    return np.dtype(np.uint32 if count <= 1 << 32 else np.uint64)


def blocks(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yield the range in blocks of BLOCK_EXAMPLES, as (start, stop)."""
    for first in range(start, stop, BLOCK_EXAMPLES):
        yield first, min(first + BLOCK_EXAMPLES, stop)


def row_lengths(prefixes: Ints, targets: Ints) -> Ints:
    """Return the positions that each example takes in a row, int32 [n]: the last target token is only a label."""
    found = np.empty(len(prefixes), np.int32)
    for start, stop in blocks(0, len(found)):
        block = slice(start, stop)
        np.subtract(prefixes[block] + targets[block], 1, out=found[block], casting="unsafe")
    return found


def check_lengths(lengths: Ints, row_tokens: int, name: Callable[[int], str], first: int = 0) -> None:
    """Refuse an empty list, and an example longer than a row; `name(first + i)` names the i-th example."""
    if not len(lengths):
        raise ConfigError("no examples to pack; check the input and --split")
    longest = int(np.argmax(lengths))
    if lengths[longest] > row_tokens:
        raise ConfigError(f"{name(first + longest)} takes {lengths[longest]} positions, more than a row of "
                          f"{row_tokens}; raise --seq-length, or preprocess again with --context-size {row_tokens}")
