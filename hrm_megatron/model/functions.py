"""The three element-wise parts of a layer as autograd functions that keep little and walk memory seldom.

Each computes the formula in its docstring in fp32 and rounds once to the dtype of its input.
"""
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F


class RMSNormFunction(torch.autograd.Function):
    """`y = x / sqrt(mean(x^2) + eps)` over the last axis (Zhang and Sennrich, arXiv 1910.07467), no weight.

    Keeps y and one factor per position: `dx = (dy - y * mean(dy * y)) / sqrt(mean(x^2) + eps)`.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        buffer = wide * wide
        inverse = buffer.mean(-1, keepdim=True).add_(eps).rsqrt_()
        y = torch.mul(wide, inverse, out=buffer).to(x.dtype)
        ctx.save_for_backward(y, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        y, inverse = (t.float() for t in ctx.saved_tensors)
        g = grads[0].float()
        # As a matrix product it reads each operand once and stores no product.
        mean = torch.einsum("...h,...h->...", g, y).unsqueeze(-1).div_(y.shape[-1])
        return torch.addcmul(g, y, mean, value=-1).mul_(inverse).to(grads[0].dtype), None


class SwiGLUFunction(torch.autograd.Function):
    """`silu(a) * b` of the halves [a | b] of the last axis (Shazeer, arXiv 2002.05202).

    Keeps silu(a) beside its input: on a CPU memory is plenty and exponentials are dear.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        a, b = x.float().chunk(2, -1)
        activated = F.silu(a)
        ctx.save_for_backward(x, activated)
        return (activated * b).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        x, activated = ctx.saved_tensors
        g = grads[0].float()
        a, b = x.float().chunk(2, -1)
        out = torch.empty(x.shape, dtype=a.dtype, device=x.device)
        da, db = out.chunk(2, -1)
        torch.ops.aten.silu_backward.grad_input(torch.mul(g, b, out=da), a, grad_input=da)
        torch.mul(g, activated, out=db)
        return out.to(x.dtype)


class RotateFunction(torch.autograd.Function):
    """Rotate the halves [a | b] of the last axis: `[a*cos - b*sin | b*cos + a*sin]` (arXiv 2104.09864).

    x is [s, b, heads, d], cos [s, b, 1, d] (its halves alike), sin [s, b, 1, d/2]. Keeps the tables, which all
    layers share: the gradient is the rotation back.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate_on(x)(x, cos, sin, False)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate_on(grads[0])(grads[0], cos, sin, True), None, None


def _rotate_on(x: torch.Tensor) -> Callable[..., torch.Tensor]:
    return _fused_rotate() if x.is_cuda else _rotate


@functools.cache
def _fused_rotate() -> Callable[..., torch.Tensor]:
    """Make one kernel of `_rotate`, as Megatron makes its own: with torch.compile."""
    from megatron.core.jit import jit_fuser  # late: what needs no GPU needs no Megatron

    fused: Callable[..., torch.Tensor] = jit_fuser(_rotate)
    return fused


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, back: bool) -> torch.Tensor:
    sign = -1 if back else 1
    wide = x.float()
    a, b = wide.chunk(2, -1)
    out = wide * cos
    first, second = out.chunk(2, -1)
    first.addcmul_(b, sin, value=-sign)
    second.addcmul_(a, sin, value=sign)
    return out.to(x.dtype)
