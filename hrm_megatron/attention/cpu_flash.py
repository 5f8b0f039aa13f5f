"""Attention over a packed row on torch's CPU flash kernel, without the copies that autograd would make.

The kernel is `aten::_scaled_dot_product_flash_attention_for_cpu`, which scaled_dot_product_attention also uses on a
CPU. Calling it and its backward directly lets one function write all pieces into shared buffers.
"""
from __future__ import annotations

from typing import Any

import torch

from hrm_megatron.attention.prefix_lm import PrefixSequences

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _heads_first(t: torch.Tensor) -> torch.Tensor:
    return t.transpose(0, 1).unsqueeze(0)  # [s, heads, d] > [1, heads, s, d]


class PackedCpuFlash(torch.autograd.Function):
    """q [s/cp, heads, d] and k, v [s, heads, d] to the output of q's shape; padding positions give zeros."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: PrefixSequences, row: int,
                scale: float | None) -> torch.Tensor:
        out = _empty(q, sequences, row)
        q_h, k_h, v_h, out_h = (_heads_first(t) for t in (q, k, v, out))
        log_sums = []
        for piece in sequences.pieces(row):
            part, log_sum = _flash(q_h.narrow(2, *piece.queries), k_h.narrow(2, *piece.keys),
                                   v_h.narrow(2, *piece.keys), 0.0, False,
                                   attn_mask=sequences.causal_bias(piece, q), scale=scale)
            out_h.narrow(2, *piece.queries).copy_(part)
            log_sums.append(log_sum)
        ctx.save_for_backward(q, k, v, out, *log_sums)
        ctx.sequences, ctx.row, ctx.scale = sequences, row, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *inputs, out = ctx.saved_tensors[:4]
        gradients = [_empty(inputs[0], ctx.sequences, ctx.row), *(_zeros(t) for t in inputs[1:])]
        g_h, q_h, k_h, v_h, out_h, *totals = (_heads_first(t) for t in (grads[0], *inputs, out, *gradients))
        for piece, log_sum in zip(ctx.sequences.pieces(ctx.row), ctx.saved_tensors[4:], strict=True):
            queries, keys = piece.queries, piece.keys
            parts = _flash_backward(
                g_h.narrow(2, *queries), q_h.narrow(2, *queries), k_h.narrow(2, *keys), v_h.narrow(2, *keys),
                out_h.narrow(2, *queries), log_sum, 0.0, False, attn_mask=ctx.sequences.causal_bias(piece, out),
                scale=ctx.scale)
            totals[0].narrow(2, *queries).copy_(parts[0])
            for total, part in zip(totals[1:], parts[1:], strict=True):
                total.narrow(2, *keys).add_(part)  # several pieces share keys
        return (*gradients, None, None, None)


def _empty(like: torch.Tensor, sequences: PrefixSequences, row: int) -> torch.Tensor:
    """Return a contiguous tensor into which each piece writes once, with zeros at padding positions, which come
    last."""
    out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    out[sum(piece.queries[1] for piece in sequences.pieces(row)):] = 0
    return out


def _zeros(like: torch.Tensor) -> torch.Tensor:
    """Return a contiguous tensor of zeros (`like` may be a view of a larger tensor)."""
    return torch.zeros(like.shape, dtype=like.dtype, device=like.device)
