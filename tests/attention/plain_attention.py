"""Attention by its formula in the precision of its inputs: how much that rounds is what kernels are measured by."""
from __future__ import annotations

import torch

from hrm_megatron.attention.prefix_lm import PrefixSequences


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: PrefixSequences,
           scale: float | None = None) -> torch.Tensor:
    """q, k, v [s, b, heads, d] to [s, b, heads * d]; padding positions give zeros."""
    rows = []
    for row in range(q.shape[1]):
        hidden = ~sequences.dense_mask(row)
        scores = torch.einsum("ihd,jhd->hij", q[:, row], k[:, row]) * (scale or q.shape[-1] ** -0.5)
        weights = scores.masked_fill(hidden, torch.finfo(scores.dtype).min).softmax(-1).masked_fill(hidden, 0)
        rows.append(torch.einsum("hij,jhd->ihd", weights, v[:, row]).flatten(1))
    return torch.stack(rows, 1)
