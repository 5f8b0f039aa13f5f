"""Norm and SwiGLU in one pass over memory each, by loops compiled for the CPU, on as many threads as torch's.

torch writes what each of its operations gives to memory and reads it again: of SwiGLU and its gradient that is twice
the traffic.
"""
from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import numpy as np
import torch

THREAD_BYTES = 1 << 20  # of memory read that is worth a thread
DTYPES = (torch.float32, torch.bfloat16)


@functools.cache
def _loops() -> ModuleType:
    from hrm_megatron.layers import loops  # late: numba takes half a second

    return loops


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads)


def in_loops(x: torch.Tensor) -> bool:
    """Tell whether the loops take x."""
    return x.device.type == "cpu" and x.dtype in DTYPES


def numbers(x: torch.Tensor) -> np.ndarray:
    """Show compiled loops a tensor: bfloat16, which numpy has not, as its bits."""
    found: np.ndarray = (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()
    return found


def divide(rows: int, read_bytes: int, run: Callable[[int, int], object]) -> None:
    """Call run(first, last) for parts of the rows, on as many threads as the bytes are worth."""
    parts = 1 if read_bytes < 2 * THREAD_BYTES else min(torch.get_num_threads(), rows, read_bytes // THREAD_BYTES)
    if parts == 1:
        run(0, rows)
        return
    ends = [rows * part // parts for part in range(parts + 1)]
    list(_pool(torch.get_num_threads()).map(run, ends[:-1], ends[1:]))


def _rows(x: torch.Tensor) -> torch.Tensor:
    """View x [..., h] as [n, h], one row after the other."""
    return x.detach().contiguous().view(-1, x.shape[-1])


def norm_in_loops(x: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Return `x / sqrt(mean(x^2) + epsilon)` over the last axis of x [..., h]."""
    rows = _rows(x)
    out = torch.empty_like(rows)
    source, target, loop = numbers(rows), numbers(out), _loops().norm_rows
    divide(len(rows), rows.nbytes, lambda first, last: loop(source, np.float32(epsilon), first, last, target))
    return out.view(x.shape)


def swiglu_in_loops(x: torch.Tensor) -> torch.Tensor:
    """Return `silu(a) * b` of the halves [a | b] of the last axis of x [..., 2 ffn]."""
    rows = _rows(x)
    out = rows.new_empty(len(rows), rows.shape[1] // 2)
    source, target, loop = numbers(rows), numbers(out), _loops().swiglu_rows
    divide(len(rows), rows.nbytes, lambda first, last: loop(source, first, last, target))
    return out.view(*x.shape[:-1], -1)


def swiglu_gradient_in_loops(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return the gradient of x [..., 2 ffn] from that of its SwiGLU, grad [..., ffn]."""
    rows = _rows(x)
    out = torch.empty_like(rows)
    given, source, target, loop = numbers(_rows(grad)), numbers(rows), numbers(out), _loops().swiglu_gradient_rows
    divide(len(rows), rows.nbytes, lambda first, last: loop(given, source, first, last, target))
    return out.view(x.shape)
