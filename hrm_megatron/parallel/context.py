"""Context parallelism: which positions of a row a rank holds, and the gather of all keys and values.

A row is cut into 2 * size chunks; rank i holds chunks i and 2 * size - 1 - i, as in stock Megatron (core/utils.py,
get_batch_on_this_cp_rank), so that every rank gets early and late positions.
"""
from __future__ import annotations

from typing import Any, NamedTuple

import torch


class Span(NamedTuple):
    """`length` consecutive positions that a rank holds, from `local` in its slice and from `start` in the row."""

    local: int
    start: int
    length: int


def context_spans(row_tokens: int, rank: int = 0, size: int = 1) -> list[Span]:
    """List the spans of `rank` in the order of its slice; adjacent chunks are one span."""
    if size == 1:
        return [Span(0, 0, row_tokens)]
    chunk = row_tokens // (2 * size)
    assert chunk * 2 * size == row_tokens, (row_tokens, size)
    if rank == size - 1:  # its chunks are adjacent
        return [Span(0, rank * chunk, 2 * chunk)]
    return [Span(0, rank * chunk, chunk), Span(chunk, (2 * size - 1 - rank) * chunk, chunk)]


def context_positions(row_tokens: int, rank: int, size: int) -> torch.Tensor:
    """Return the row positions of `rank`, [s / size]."""
    return torch.cat([torch.arange(span.start, span.start + span.length)
                      for span in context_spans(row_tokens, rank, size)])


class GatherRows(torch.autograd.Function):
    """All-gather the slices [s/cp, ...] of all ranks into [s, ...] in row order; backward reduce-scatters the
    gradients."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        size = group.size()
        gathered = x.new_empty(len(x) * size, *x.shape[1:])
        torch.distributed.all_gather_into_tensor(gathered, x.contiguous(), group=group)
        ctx.group = group
        chunks = sorted(zip(_chunks_of_ranks(size), gathered.chunk(2 * size), strict=True), key=lambda one: one[0])
        return torch.cat([rows for _, rows in chunks])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        g = grads[0]
        out = g.new_empty(len(g) // ctx.group.size(), *g.shape[1:])
        chunks = g.chunk(2 * ctx.group.size())
        by_rank = torch.cat([chunks[chunk] for chunk in _chunks_of_ranks(ctx.group.size())])
        torch.distributed.reduce_scatter_tensor(out, by_rank, group=ctx.group)
        return out, None


def _chunks_of_ranks(size: int) -> list[int]:
    """Return the chunk numbers in the order in which the concatenated slices of all ranks hold them.

    Concatenating whole chunks takes one kernel; indexing by position would first copy an index to the device.
    """
    return [chunk for rank in range(size) for chunk in (rank, 2 * size - 1 - rank)]
