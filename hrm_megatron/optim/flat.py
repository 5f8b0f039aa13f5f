"""Flat buffers for masters and optimizer state, so that one call updates many weights."""
from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch

PADDING = 64  # elements; Megatron aligns every weight of a buffer to a multiple of it (param_layout.pad_param_start)
# Elements. An H100 updates this many in 0.2 ms (38 bytes each at 3.3 TB/s), longer than the host takes for the call.
LARGE = 1 << 24
Row = tuple[torch.Tensor, ...]  # of one weight: master, state tensors, gradient (last)


class Shard(NamedTuple):
    """The part of a weight that this rank owns: elements [start, end) of a bucket."""

    bucket: Hashable
    start: int
    end: int


def starts_of(shards: Sequence[Shard]) -> tuple[list[int], int]:
    """Return the start of each shard in one flat buffer, with the same padding as in its bucket, and the total size."""
    starts: list[int] = []
    end, before = 0, None
    for shard in shards:
        gap = shard.start - before.end if before and before.bucket == shard.bucket else PADDING
        starts.append(end + gap if gap < PADDING else -(-end // PADDING) * PADDING)
        end, before = starts[-1] + shard.end - shard.start, shard
    return starts, end


class FlatState:
    """One flat buffer per optimizer-state tensor of a group of weights, allocated on the first `take`."""

    def __init__(self, size: int) -> None:
        self.size, self.parts = size, dict[str, torch.Tensor]()

    def take(self, state: dict[str, torch.Tensor], start: int) -> None:
        """Move the state of one weight into the buffers at `start`, unless it is already there."""
        for name, tensor in state.items():
            if name not in self.parts:
                self.parts[name] = tensor.new_zeros(self.size)
            flat = self.parts[name]
            if tensor.data_ptr() != flat.data_ptr() + start * flat.element_size():
                state[name] = flat[start:start + tensor.numel()].view_as(tensor).copy_(tensor)


def joined(rows: Iterable[Row | None]) -> Iterator[Row]:
    """Merge consecutive rows that are adjacent in memory (up to padding) into one row of flat tensors, and yield each
    merged row. None ends a run of rows.

    Gradients that are not adjacent, as those of several DDP buckets, are first copied into one buffer, by one call and
    at a time when no activations are alive. A run or a row of at least `LARGE` elements is not copied: it gets its own
    call.
    """
    run: list[Row] = []
    distances: list[int] = []
    for row in (*rows, None):
        distance = _common(run[-1][:-1], row[:-1]) if run and row else None
        if row and distance is not None and _distance(run[-1][-1], row[-1]) != distance:
            size = sum(distances) + run[-1][0].numel()
            distance = distance if max(size, row[0].numel()) < LARGE else None
        if distance is not None:
            distances.append(distance)
        else:
            if run:
                yield _one(run, distances)
            run, distances = [], []
        if row:
            run.append(row)


def _common(row: Row, following: Row) -> int | None:
    """Return the distance of two rows in elements if it is the same in all columns, else None."""
    distances = {_distance(*pair) for pair in zip(row, following, strict=True)}
    return distances.pop() if len(distances) == 1 else None


def _distance(a: torch.Tensor, b: torch.Tensor) -> int | None:
    """Return the distance in elements from the start of `a` to that of `b`, or None unless both are in one storage
    with only padding between them."""
    distance = int(b.storage_offset()) - int(a.storage_offset())
    same = a.dtype == b.dtype and b.data_ptr() - a.data_ptr() == distance * a.element_size()
    return distance if same and 0 <= distance - a.numel() < PADDING else None


def _one(run: list[Row], distances: list[int]) -> Row:
    if not distances:
        return run[0]
    size = sum(distances) + run[-1][0].numel()
    *state, gradients = zip(*run, strict=True)
    if [_distance(*pair) for pair in itertools.pairwise(gradients)] != distances:
        gradients = _copies(gradients, distances, size)
    return tuple(column[0].as_strided((size,), (1,)) for column in (*state, gradients))


def _copies(gradients: Sequence[torch.Tensor], distances: Sequence[int], size: int) -> tuple[torch.Tensor, ...]:
    flat = gradients[0].new_zeros(size)
    starts = itertools.accumulate(distances, initial=0)
    places = [flat[start:start + gradient.numel()].view_as(gradient)
              for start, gradient in zip(starts, gradients, strict=True)]
    torch._foreach_copy_(places, list(gradients))
    return tuple(places)
