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
    """Queries that share their keys: the prefix of an example, or its responses."""

    queries: slice
    keys: slice
    bias: torch.Tensor | None


def blocks(sequences: PrefixSequences, row: int, like: torch.Tensor) -> Iterator[Block]:
    """Yield the blocks of a row; of each example the responses, whose keys are all its keys, come first."""
    start = 0
    for p, r in sequences.lengths[row]:
        middle, end = start + p, start + p + r
        if r:
            yield Block(slice(middle, end), slice(start, end), sequences.response_bias(p, r, like))
        yield Block(slice(start, middle), slice(start, middle), None)
        start = end


def _heads_first(t: torch.Tensor) -> torch.Tensor:
    return t.transpose(0, 1).unsqueeze(0)  # [n, heads, d] > [1, heads, n, d]


def _rows_first(t: torch.Tensor) -> torch.Tensor:
    return t.squeeze(0).transpose(0, 1)


class PackedCpuFlash(torch.autograd.Function):
    """q, k, v [s, heads, d] to the attention output of the same shape; padding positions give zeros."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: PrefixSequences, row: int,
                scale: float | None) -> torch.Tensor:
        out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
        log_sums = []
        for queries, keys, bias in blocks(sequences, row, q):
            part, log_sum = _flash(_heads_first(q[queries]), _heads_first(k[keys]), _heads_first(v[keys]), 0.0, False,
                                   attn_mask=bias, scale=scale)
            out[queries] = _rows_first(part)
            log_sums.append(log_sum)
        ctx.save_for_backward(q, k, v, out, *log_sums)
        ctx.sequences, ctx.row, ctx.scale = sequences, row, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, *log_sums = ctx.saved_tensors
        dq, dk, dv = (torch.zeros(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        for (queries, keys, bias), log_sum in zip(blocks(ctx.sequences, ctx.row, q), log_sums, strict=True):
            dq_part, dk_part, dv_part = _flash_backward(
                _heads_first(grads[0][queries]), _heads_first(q[queries]), _heads_first(k[keys]),
                _heads_first(v[keys]), _heads_first(out[queries]), log_sum, 0.0, False, attn_mask=bias,
                scale=ctx.scale)
            dq[queries] = _rows_first(dq_part)
            dk[keys] += _rows_first(dk_part)
            dv[keys] += _rows_first(dv_part)
        return dq, dk, dv, None, None, None
