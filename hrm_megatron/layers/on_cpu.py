"""Norm, gate and SwiGLU in one pass over memory each, by loops compiled for the CPU.

torch writes the result of each operation to memory and reads it again: twice the traffic for SwiGLU and its gradient,
2.7 times for the gradient of a norm, and more in bfloat16, which it widens in memory.
"""
from __future__ import annotations

import functools
from types import ModuleType

import numpy as np
import torch

DIVIDED_BYTES = 1 << 17  # of memory read from which on a loop runs on several threads
DTYPES = (torch.float32, torch.bfloat16)


@functools.cache
def _loops() -> ModuleType:
    from hrm_megatron.layers import loops  # late: numba takes half a second

    return loops


def in_loops(x: torch.Tensor) -> bool:
    """Whether the loops support x: fp32 or bf16 on a CPU."""
    return x.device.type == "cpu" and x.dtype in DTYPES


def numbers(x: torch.Tensor) -> np.ndarray:
    """Return a numpy view of a tensor for compiled loops; bfloat16, which numpy lacks, as its bits."""
    found: np.ndarray = (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()
    return found


def threads_for(read_bytes: int) -> int:
    """Return the number of threads for a loop that reads `read_bytes`: all of torch's, or one."""
    return 1 if read_bytes < DIVIDED_BYTES else torch.get_num_threads()


def _rows(x: torch.Tensor) -> np.ndarray:
    """Return a contiguous x [..., h] as a numpy view [n, h]."""
    return numbers(x).reshape(-1, x.shape[-1])


def norm_in_loops(x: torch.Tensor, epsilon: float, factors: torch.Tensor | None = None) -> torch.Tensor:
    """Return `x / sqrt(mean(x^2) + epsilon)` over the last axis of x [..., h], and write the factor on x to `factors`,
    [..., 1] in fp32."""
    x = x.detach().contiguous()
    out = torch.empty_like(x)
    _loops().norm_rows(threads_for(x.nbytes), _rows(x), np.float32(epsilon), _rows(out),
                       None if factors is None else factors.view(-1).numpy())
    return out


def norm_gradient_in_loops(grad: torch.Tensor, y: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Return the gradient of `norm_in_loops`' x from its results y and factors and the gradient of y, grad [..., h]."""
    grad, y = grad.detach().contiguous(), y.detach()
    out = torch.empty_like(grad)
    _loops().norm_gradient_rows(threads_for(grad.nbytes), _rows(grad), _rows(y), factors.view(-1).numpy(), _rows(out))
    return out


def gated_in_loops(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """Return `x * sigmoid(gate)`, both [..., h]."""
    x, gate = x.detach().contiguous(), gate.detach().contiguous()
    out = torch.empty_like(x)
    _loops().gated_rows(threads_for(x.nbytes), _rows(x), _rows(gate), _rows(out))
    return out


def gated_gradients_in_loops(grad: torch.Tensor, x: torch.Tensor, gate: torch.Tensor) -> tuple[
        torch.Tensor, torch.Tensor]:
    """Return the gradients of x and gate [..., h] from the gradient of `gated_in_loops`, grad [..., h]."""
    grad, x, gate = (t.detach().contiguous() for t in (grad, x, gate))
    of_x, of_gate = torch.empty_like(x), torch.empty_like(gate)
    _loops().gated_gradients_rows(threads_for(x.nbytes), *map(_rows, (grad, x, gate, of_x, of_gate)))
    return of_x, of_gate


def swiglu_in_loops(x: torch.Tensor) -> torch.Tensor:
    """Return `silu(a) * b` of the halves [a | b] of the last axis of x [..., 2 ffn]."""
    x = x.detach().contiguous()
    out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    _loops().swiglu_rows(threads_for(x.nbytes), _rows(x), _rows(out))
    return out


def swiglu_gradient_in_loops(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return the gradient of x [..., 2 ffn] from the gradient of its SwiGLU, grad [..., ffn]."""
    grad, x = grad.detach().contiguous(), x.detach().contiguous()
    out = torch.empty_like(x)
    _loops().swiglu_gradient_rows(threads_for(x.nbytes), _rows(grad), _rows(x), _rows(out))
    return out
