"""Attention over a packed row on torch's CPU flash kernel, without the copies that autograd would make.

The kernel itself is `aten::_scaled_dot_product_flash_attention_for_cpu`, which scaled_dot_product_attention picks
on a CPU too; calling it and its backward by name lets one function write all examples into shared buffers.
"""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from hrm_megatron.model.prefix_lm import PrefixSequences

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Block(NamedTuple):
    """Queries that share their keys, the responses of an example or its prefix: (start, length) of each.

    `first` tells that no block before had any of these keys.
    """

    queries: tuple[int, int]
    keys: tuple[int, int]
    bias: torch.Tensor | None
    first: bool


def blocks(sequences: PrefixSequences, row: int, like: torch.Tensor) -> Iterator[Block]:
    """Yield the blocks of a row; of each example first the one that sees all of it."""
    start = 0
    for p, r in sequences.lengths[row]:
        if r:
            yield Block((start + p, r), (start, p + r), sequences.response_bias(p, r, like), True)
        yield Block((start, p), (start, p), None, not r)
        start += p + r


def _heads_first(t: torch.Tensor) -> torch.Tensor:
    return t.transpose(0, 1).unsqueeze(0)  # [s, heads, d] > [1, heads, s, d]


class PackedCpuFlash(torch.autograd.Function):
    """q, k, v [s, heads, d] to the attention output of the same shape; padding positions give zeros."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: PrefixSequences, row: int,
                scale: float | None) -> torch.Tensor:
        out = _zero_padded(q, sequences, row)
        q_h, k_h, v_h, out_h = (_heads_first(t) for t in (q, k, v, out))
        log_sums = []
        for queries, keys, bias, _ in blocks(sequences, row, q):
            part, log_sum = _flash(q_h.narrow(2, *queries), k_h.narrow(2, *keys), v_h.narrow(2, *keys), 0.0, False,
                                   attn_mask=bias, scale=scale)
            out_h.narrow(2, *queries).copy_(part)
            log_sums.append(log_sum)
        ctx.save_for_backward(q, k, v, out, *log_sums)
        ctx.sequences, ctx.row, ctx.scale = sequences, row, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *saved, out = ctx.saved_tensors[:4]
        gradients = [_zero_padded(t, ctx.sequences, ctx.row) for t in saved]
        g_h, q_h, k_h, v_h, out_h, *totals = (_heads_first(t) for t in (grads[0], *saved, out, *gradients))
        for (queries, keys, bias, first), log_sum in zip(blocks(ctx.sequences, ctx.row, out), ctx.saved_tensors[4:],
                                                         strict=True):
            parts = _flash_backward(
                g_h.narrow(2, *queries), q_h.narrow(2, *queries), k_h.narrow(2, *keys), v_h.narrow(2, *keys),
                out_h.narrow(2, *queries), log_sum, 0.0, False, attn_mask=bias, scale=ctx.scale)
            for total, part, place, new in zip(totals, parts, (queries, keys, keys), (True, first, first), strict=True):
                target = total.narrow(2, *place)
                target.copy_(part) if new else target.add_(part)
        return (*gradients, None, None, None)


def _zero_padded(like: torch.Tensor, sequences: PrefixSequences, row: int) -> torch.Tensor:
    """Make a contiguous [s, heads, d] tensor whose padding is zero and whose examples are still to be written."""
    out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    out[sum(p + r for p, r in sequences.lengths[row]):] = 0
    return out
