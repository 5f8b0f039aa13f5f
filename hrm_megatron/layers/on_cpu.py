"""Norm and SwiGLU in one pass over memory each, by loops compiled for the CPU.

torch writes what each of its operations gives to memory and reads it again: of SwiGLU and its gradient that is twice
the traffic.
"""
from __future__ import annotations

import functools
from types import ModuleType

import numpy as np
import torch

DIVIDED_BYTES = 1 << 17  # of memory read, from which on a loop is divided among threads
DTYPES = (torch.float32, torch.bfloat16)


@functools.cache
def _loops() -> ModuleType:
    from hrm_megatron.layers import loops  # late: numba takes half a second

    return loops


def in_loops(x: torch.Tensor) -> bool:
    """Tell whether the loops take x."""
    return x.device.type == "cpu" and x.dtype in DTYPES


def numbers(x: torch.Tensor) -> np.ndarray:
    """Show compiled loops a tensor: bfloat16, which numpy has not, as its bits."""
    found: np.ndarray = (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()
    return found


def threads_for(read_bytes: int) -> int:
    """Return on how many threads a loop is to read so many bytes: all of torch's, or one."""
    return 1 if read_bytes < DIVIDED_BYTES else torch.get_num_threads()


def _rows(x: torch.Tensor) -> np.ndarray:
    """Show compiled loops a contiguous x [..., h] as [n, h]."""
    return numbers(x).reshape(-1, x.shape[-1])


def norm_in_loops(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return `x / sqrt(mean(x^2) + epsilon)` over the last axis of x [..., h]."""
    x = x.detach().contiguous()
    out = torch.empty_like(x)
    _loops().norm_rows(threads_for(x.nbytes), _rows(x), np.float32(epsilon), _rows(out))
    return out


def swiglu_in_loops(x: torch.Tensor) -> torch.Tensor:
    """Return `silu(a) * b` of the halves [a | b] of the last axis of x [..., 2 ffn]."""
    x = x.detach().contiguous()
    out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    _loops().swiglu_rows(threads_for(x.nbytes), _rows(x), _rows(out))
    return out


def swiglu_gradient_in_loops(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return the gradient of x [..., 2 ffn] from that of its SwiGLU, grad [..., ffn]."""
    grad, x = grad.detach().contiguous(), x.detach().contiguous()
    out = torch.empty_like(x)
    _loops().swiglu_gradient_rows(threads_for(x.nbytes), _rows(grad), _rows(x), _rows(out))
    return out
