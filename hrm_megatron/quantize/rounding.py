"""Quantize a matrix: by plain rounding, or column by column so that later columns compensate earlier errors."""
from __future__ import annotations

from dataclasses import dataclass

import torch

from hrm_megatron.convert.low_bit import LowBit, Scheme, stored_scale
from hrm_megatron.quantize.hessians import Moments

# Fraction of the mean of the Hessian's diagonal that is added to it: GPTQ (arXiv 2210.17323), section 3.3.
DAMPING = 0.01
BLOCK_COLUMNS = 128  # columns beyond a block are updated once per block: same paper, "lazy batch updates"
SHRINKS = tuple(1 - i / 40 for i in range(17))  # factors tried for int scales: 1 (clips nothing) to 0.6
EXPONENTS = (1.0, 0.5, 2.0)  # factors tried for a power-of-two scale


@dataclass(frozen=True)
class Rounded:
    """A quantized matrix, and the numbers [out, in], in units of its codes, that were rounded to it."""

    matrix: LowBit
    steps: torch.Tensor


def round_plainly(weight: torch.Tensor, scheme: Scheme) -> LowBit:
    """Round each weight to the nearest code; scales come from the largest magnitude of each group."""
    grouped = weight.float().unflatten(1, (scheme.groups(weight.shape[1]), -1))
    scales = scheme.scales(grouped.abs().amax(-1))
    codes = scheme.nearest(grouped / (scales.unsqueeze(-1) * scheme.unit)).flatten(1)
    return LowBit(codes.to(torch.int8), scales, scheme)


def aligned(weight: torch.Tensor, moments: Moments) -> torch.Tensor:
    """Return the weight whose outputs on the quantized model's inputs match `weight` on the full model's inputs, in
    least squares.

    It minimizes |W f - V x|^2 + damping |W - V|^2 over V, summed over the inputs; V is then rounded with the Hessian of
    x. Source: Qronos (arXiv 2505.11695), GPTAQ (arXiv 2504.02692).
    """
    damping = _damping(moments.hessian)
    # V (H + d) = W (C + d), and H is symmetric.
    wanted = weight.double() @ (moments.cross + damping)
    return torch.linalg.solve(moments.hessian + damping, wanted.t()).t().to(weight.dtype)


def round_by_hessian(weight: torch.Tensor, hessian: torch.Tensor, scheme: Scheme) -> Rounded:
    """Minimize (V - W) H (V - W)^T over codes, greedily by columns in their natural order: GPTQ (arXiv 2210.17323).

    weight [out, in], hessian [in, in]. The scales of each group are chosen when its first column is reached.
    """
    left = weight.double().clone()
    columns = weight.shape[1]
    width = scheme.group_size or columns
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian + _damping(hessian)))
    factor = torch.linalg.cholesky(inverse, upper=True)
    codes, steps = torch.empty_like(left), torch.empty_like(left)
    scales = left.new_empty(len(left), scheme.groups(columns))
    for start in range(0, columns, BLOCK_COLUMNS):
        end = min(start + BLOCK_COLUMNS, columns)
        errors = left.new_empty(len(left), end - start)
        for i in range(start, end):
            group = i // width
            if i % width == 0:
                importance = factor.diagonal()[i:i + width].pow(-2)
                # Columns beyond the block do not have its errors applied yet; their magnitudes hardly change.
                scales[:, group] = choose_scales(left[:, i:i + width].float(), importance.float(), scheme)
            steps[:, i] = left[:, i] / (scales[:, group] * scheme.unit)
            codes[:, i] = scheme.nearest(steps[:, i])
            error = (left[:, i] - codes[:, i] * scales[:, group] * scheme.unit) / factor[i, i]
            left[:, i:end] -= error[:, None] * factor[i, i:end]
            errors[:, i - start] = error
        left[:, end:] -= errors @ factor[start:end, end:]
    return Rounded(LowBit(codes.to(torch.int8), scales.float(), scheme), steps.float())


def choose_scales(group: torch.Tensor, importance: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Return for each row of `group` [out, n] the scale with least squared error weighted by `importance` [n]."""
    plain = scheme.scales(group.abs().amax(1))
    best, least = plain, torch.full_like(plain, float("inf"))
    for factor in EXPONENTS if scheme.is_float else SHRINKS:
        scale = plain * factor if scheme.is_float else stored_scale(plain * factor)
        step = scale[:, None] * scheme.unit
        error = (scheme.nearest(group / step) * step - group).square() @ importance
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def _damping(hessian: torch.Tensor) -> torch.Tensor:
    # Never zero, so that an input which is always zero leaves its column unchanged.
    mean = hessian.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    return torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device) * (DAMPING * mean)
