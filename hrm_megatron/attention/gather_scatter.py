"""Gather rows of queries, keys and values for attention kernels and scatter the results back, with as few copies as
possible."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import batched
from typing import Any

import torch

from hrm_megatron.data.batch import send


@dataclass(frozen=True)
class RowIndex:
    """Index [n] of rows of a tensor [t, ...], on its device; `run` is (first, last + 1) if the rows are contiguous.

    If rows occur twice, `parts` splits the index into parts without duplicates: (places in the index, rows there).
    (Adding at duplicate rows takes atomics: slow in bf16, and nondeterministic.)
    """

    index: torch.Tensor
    run: tuple[int, int] | None
    parts: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()

    @classmethod
    def of(cls, index: torch.Tensor, device: torch.device, again: torch.Tensor | None = None) -> RowIndex:
        """Send `index`, a non-empty host tensor, to the device. `again` [n] is True where a row occurs for the second
        time; none may occur three times."""
        if again is not None:
            places = [part.nonzero().squeeze(1) for part in (~again, again)]
            return cls(send(index, device), None, tuple((send(at, device), send(index[at], device)) for at in places))
        first, end = int(index[0]), int(index[0]) + len(index)
        is_run = torch.equal(index, torch.arange(first, end))
        return cls(send(index, device), (first, end) if is_run else None)

    def __len__(self) -> int:
        return len(self.index)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """Return these rows [n, ...] of `x`, contiguous: a view if they are one contiguous run."""
        return x[slice(*self.run)].contiguous() if self.run else x.index_select(0, self.index)

    def scatter(self, rows: torch.Tensor, count: int) -> torch.Tensor:
        """Return [count, ...] with the sum of `rows` at these indices and zeros elsewhere."""
        if not self.run:
            return self.scatter_add_(rows, rows.new_zeros(count, *rows.shape[1:]))
        first, end = self.run
        out = rows.new_empty(count, *rows.shape[1:])
        out[:first], out[end:] = 0, 0
        out[first:end] = rows
        return out

    def scatter_add_(self, rows: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        """Add `rows` to these rows of `total`, in place."""
        if self.run:
            total[slice(*self.run)] += rows
        elif self.parts:
            for places, index in self.parts:
                total.index_copy_(0, index, total.index_select(0, index) + rows.index_select(0, places))
        else:
            total.index_copy_(0, self.index, total.index_select(0, self.index) + rows)
        return total


class GatherForCalls(torch.autograd.Function):
    """q [tq, ...], k and v [tk, ...] to the queries, keys and values of each call in turn.

    `indices` holds the three indices of each call. Gradients of all calls are summed into one tensor per input.
    """

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                indices: Sequence[tuple[RowIndex, RowIndex, RowIndex]]) -> tuple[torch.Tensor, ...]:
        ctx.indices, ctx.counts = indices, (len(q), len(k), len(v))
        return tuple(index.gather(x) for of_call in indices for index, x in zip(of_call, (q, k, v), strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        sums = []
        for count, indices, parts in zip(
                ctx.counts, zip(*ctx.indices, strict=True), zip(*batched(grads, 3), strict=True), strict=True):
            (widest, first), *others = sorted(zip(indices, parts, strict=True), key=lambda one: -len(one[0]))
            total = widest.scatter(first, count)
            for index, part in others:
                index.scatter_add_(part, total)
            sums.append(total)
        return *sums, None


class ScatterFromCalls(torch.autograd.Function):
    """Results [n, ...] of all calls, at the rows of their queries, to [count, ...] with zeros where there is no
    query."""

    @staticmethod
    def forward(ctx: Any, queries: Sequence[RowIndex], count: int, *results: torch.Tensor) -> torch.Tensor:
        ctx.queries = queries
        out = results[0].new_zeros(count, *results[0].shape[1:])
        for index, result in zip(queries, results, strict=True):
            out.index_copy_(0, index.index, result)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, *(index.gather(grads[0]) for index in ctx.queries)
