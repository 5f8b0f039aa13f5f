"""Element-wise operations of a layer, four of them also as autograd functions that save little and make few passes over
memory.

Each computes its formula in fp32 and rounds once to the dtype of its input. The formulas come first, as plain
functions: under torch.compile of a whole layer these are used, and the compiler decides what to save. Otherwise the
autograd functions run: norm and rotation as one compiled kernel each on a GPU (for SwiGLU and the gate Megatron has its
own); norm, gate and SwiGLU as one loop per direction on a CPU (on_cpu.py); anything else as written.
"""
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate

import torch
import torch.nn.functional as F

from hrm_megatron.layers.on_cpu import (
    gated_gradients_in_loops,
    gated_in_loops,
    in_loops,
    norm_gradient_in_loops,
    norm_in_loops,
    swiglu_gradient_in_loops,
    swiglu_in_loops,
)


def rms_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    """`x / sqrt(mean(x^2) + eps)` over the last axis (Zhang and Sennrich, arXiv 1910.07467), no weight."""
    wide = x.float()
    return (wide * (wide.pow(2).mean(-1, keepdim=True) + eps).rsqrt()).to(x.dtype)


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """`silu(a) * b` of the halves [a | b] of the last axis (Shazeer, arXiv 2002.05202)."""
    a, b = x.float().chunk(2, -1)
    return (F.silu(a) * b).to(x.dtype)


def swiglu_gradient(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return the gradient of `swiglu`'s input."""
    a, b = x.float().chunk(2, -1)
    g, s = grad.float(), torch.sigmoid(a)
    return torch.cat((g * b * s * (1 + a * (1 - s)), g * a * s), -1).to(x.dtype)


def gated(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """`x * sigmoid(gate)`, both [...] (Megatron-Core, Attention._apply_output_gate)."""
    return (x * torch.sigmoid(gate.float())).to(x.dtype)


def gated_gradients(grad: torch.Tensor, x: torch.Tensor, gate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of `gated`'s inputs."""
    g, s = grad.float(), torch.sigmoid(gate.float())
    return (g * s).to(x.dtype), (g * x * s * (1 - s)).to(gate.dtype)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """`[a*cos - b*sin | b*cos + a*sin]` of the halves [a | b] of the last axis (arXiv 2104.09864).

    x is [s, b, heads, d], cos [s, b, 1, d] (its halves alike), sin [s, b, 1, d/2].
    """
    a, b = x.float().chunk(2, -1)
    return (x.float() * cos + torch.cat((-b * sin, a * sin), -1)).to(x.dtype)


def fused_on_a_gpu[**P, T](function: Callable[Concatenate[torch.Tensor, P], T]) -> Callable[
        Concatenate[torch.Tensor, P], T]:
    """Fuse `function` into one kernel when its first argument is on a GPU, by torch.compile as in Megatron."""
    @functools.cache
    def compiled() -> Any:
        from megatron.core.jit import jit_fuser  # late: without a GPU Megatron is not needed

        return jit_fuser(function)

    @functools.wraps(function)
    def run(x: torch.Tensor, /, *args: P.args, **kwargs: P.kwargs) -> T:
        out: T = (compiled() if x.is_cuda else function)(x, *args, **kwargs)
        return out
    return run


@fused_on_a_gpu
def normalize(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., h] to normalized x and the factor of each position, [..., 1] in fp32."""
    wide = x.float()
    # One pass: the squares are never stored.
    squares = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
    inverse = squares.div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * inverse).to(x.dtype), inverse


@fused_on_a_gpu
def normalize_backward(grad: torch.Tensor, y: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Return the gradient of `normalize`'s input, from its results."""
    g, y = grad.float(), y.float()
    if torch.compiler.is_compiling():
        mean = (g * y).mean(-1, keepdim=True)
    else:  # as einsum: reads each operand once and stores no product
        mean = torch.einsum("...h,...h->...", g, y).unsqueeze(-1).div_(y.shape[-1])
    return torch.addcmul(g, y, mean, value=-1).mul_(inverse).to(grad.dtype)


@fused_on_a_gpu
def rotate(cos: torch.Tensor, sin: torch.Tensor, back: bool, *states: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Rotate each of `states` as `rotated` does, or by the opposite angle if `back`."""
    sign = -1 if back else 1
    results = []
    for x in states:
        wide = x.float()
        a, b = wide.chunk(2, -1)
        out = wide * cos
        first, second = out.chunk(2, -1)
        first.addcmul_(b, sin, value=-sign)
        second.addcmul_(a, sin, value=sign)
        results.append(out.to(x.dtype))
    return tuple(results)


class _NothingKept:
    """Context of an autograd function whose backward will not be called."""

    needs_input_grad = (False,) * 9

    def save_for_backward(self, *_: Any) -> None: ...


def run(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Apply an autograd function; with gradients disabled call its forward directly, in a fifth of the host time."""
    if torch.is_grad_enabled():
        return function.apply(*arguments)
    return function.forward(_NothingKept(), *arguments)


class RMSNormFunction(torch.autograd.Function):
    """`rms_norm` with its own backward.

    Saves y and one factor per position: `dx = (dy - y * mean(dy * y)) / sqrt(mean(x^2) + eps)`.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, eps: float) -> torch.Tensor:
        if in_loops(x):
            inverse = x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
            y = norm_in_loops(x, eps, inverse)
        else:
            y, inverse = normalize(x, eps)
        ctx.save_for_backward(y, inverse)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        y, inverse = ctx.saved_tensors
        return (norm_gradient_in_loops if in_loops(y) else normalize_backward)(grads[0], y, inverse), None


class SwiGLUFunction(torch.autograd.Function):
    """`swiglu` with its own backward, which saves only the input; on a CPU one pass per direction."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return swiglu_in_loops(x) if in_loops(x) else swiglu(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        [x] = ctx.saved_tensors
        return swiglu_gradient_in_loops(grads[0], x) if in_loops(x) else swiglu_gradient(grads[0], x)


class GatedFunction(torch.autograd.Function):
    """`gated` with its own backward, which saves both inputs; on a CPU one pass per direction."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, gate)
        return (gated_in_loops if in_loops(x) else gated)(x, gate)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, gate = ctx.saved_tensors
        return (gated_gradients_in_loops if in_loops(x) else gated_gradients)(grads[0], x, gate)


class RotateFunction(torch.autograd.Function):
    """`rotated` of several states with its own backward.

    Saves only the tables, which all layers share: the gradient is the inverse rotation.
    """

    @staticmethod
    def forward(ctx: Any, cos: torch.Tensor, sin: torch.Tensor, *states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(cos, sin)
        return rotate(cos, sin, False, *states)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return None, None, *rotate(cos, sin, True, *grads)
