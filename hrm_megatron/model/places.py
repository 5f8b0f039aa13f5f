"""Rows of queries, keys and values on their way to an attention kernel and back, moved as seldom as can be."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import batched
from typing import Any

import torch

from hrm_megatron.data.batch import send


@dataclass(frozen=True)
class Places:
    """Places [n] among rows [t, ...]: an index on the device and, where they are one run, (first, behind the last).

    `distinct`: no place is there twice. (Adding at places that are not is atomic, which bf16 does slowly.)
    """

    index: torch.Tensor
    run: tuple[int, int] | None
    distinct: bool

    @classmethod
    def of(cls, index: torch.Tensor, distinct: bool, device: torch.device) -> Places:
        """Send `index`, which is on the host and not empty, to the device."""
        first, behind = int(index[0]), int(index[0]) + len(index)
        is_run = torch.equal(index, torch.arange(first, behind))
        return cls(send(index, device), (first, behind) if is_run else None, distinct)

    def __len__(self) -> int:
        return len(self.index)

    def take(self, x: torch.Tensor) -> torch.Tensor:
        """Rows [n, ...] at these places, contiguous: a view if they are a run of contiguous rows."""
        return x[slice(*self.run)].contiguous() if self.run else x.index_select(0, self.index)

    def put(self, rows: torch.Tensor, count: int) -> torch.Tensor:
        """Make [count, ...] with the sum of `rows` at these places and zeros elsewhere."""
        if not self.run:
            return self.add(rows, rows.new_zeros(count, *rows.shape[1:]))
        first, behind = self.run
        out = rows.new_empty(count, *rows.shape[1:])
        out[:first], out[behind:] = 0, 0
        out[first:behind] = rows
        return out

    def add(self, rows: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
        """Add `rows` at these places of `total`, in place."""
        if self.run:
            total[slice(*self.run)] += rows
        elif self.distinct:
            total.index_copy_(0, self.index, total.index_select(0, self.index) + rows)
        else:
            total.index_add_(0, self.index, rows)
        return total


class ToCalls(torch.autograd.Function):
    """q [tq, ...], k and v [tk, ...] to queries, keys and values of each call in turn.

    `places` holds those of these three for each call. The gradients of all calls meet in one tensor each.
    """

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                places: Sequence[tuple[Places, Places, Places]]) -> tuple[torch.Tensor, ...]:
        ctx.places, ctx.counts = places, (len(q), len(k), len(v))
        return tuple(place.take(x) for of_call in places for place, x in zip(of_call, (q, k, v), strict=True))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        sums = []
        for count, places, parts in zip(
                ctx.counts, zip(*ctx.places, strict=True), zip(*batched(grads, 3), strict=True), strict=True):
            (widest, first), *others = sorted(zip(places, parts, strict=True), key=lambda one: -len(one[0]))
            total = widest.put(first, count)
            for place, part in others:
                place.add(part, total)
            sums.append(total)
        return *sums, None


class FromCalls(torch.autograd.Function):
    """Results of all calls, each [n, ...] at its queries' places, to [count, ...] with zeros where no query is."""

    @staticmethod
    def forward(ctx: Any, queries: Sequence[Places], count: int, *results: torch.Tensor) -> torch.Tensor:
        ctx.queries = queries
        out = results[0].new_zeros(count, *results[0].shape[1:])
        for place, result in zip(queries, results, strict=True):
            out.index_copy_(0, place.index, result)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, *(place.take(grads[0]) for place in ctx.queries)
