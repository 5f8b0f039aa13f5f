"""The loops of a CPU between two matmuls, compiled by numba, on as many threads as torch's."""
from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from hrm_megatron.attention.rotary import Rotation

THREAD_BYTES = 1 << 20  # of memory read that is worth a thread


def numbers(x: torch.Tensor) -> np.ndarray:
    """Show compiled loops a tensor: bfloat16, which numpy has not, as its bits."""
    found: np.ndarray = (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()
    return found


class Loops:
    """Norm and SwiGLU over rows, and what attention needs at all steps: cosines and sines [context, d/2] of every
    position."""

    def __init__(self, context_tokens: int, head_dim: int, theta: float) -> None:
        from hrm_megatron.generate import attention_kernels, kernels  # late: numba takes half a second

        self.kernels, self.attention_kernels = kernels, attention_kernels
        rotation = Rotation.of(torch.arange(context_tokens)[None], head_dim, theta)
        self.cos = rotation.cos[:, 0, 0, :head_dim // 2].contiguous().numpy()
        self.sin = rotation.sin[:, 0, 0].contiguous().numpy()
        self.threads = torch.get_num_threads()
        self.pool = ThreadPoolExecutor(self.threads)

    def divide(self, rows: int, read_bytes: int, run: Callable[[int, int], object]) -> None:
        """Call run(first, last) for parts of the rows, on as many threads as the bytes are worth."""
        parts = max(1, min(self.threads, rows, read_bytes // THREAD_BYTES))
        if parts == 1:
            run(0, rows)
        else:
            ends = [rows * part // parts for part in range(parts + 1)]
            list(self.pool.map(run, ends[:-1], ends[1:]))

    def norm(self, x: torch.Tensor, epsilon: float) -> torch.Tensor:
        """Return `x / sqrt(mean(x^2) + epsilon)` over the last axis of x [n, h]."""
        out = torch.empty_like(x)
        source, target = numbers(x), numbers(out)
        self.divide(len(x), x.nbytes, lambda first, last: self.kernels.norm_rows(
            source[first:last], np.float32(epsilon), target[first:last]))
        return out

    def swiglu(self, x: torch.Tensor) -> torch.Tensor:
        """Return `silu(a) * b` of the halves [a | b] of x [n, 2 ffn]."""
        out = x.new_empty(len(x), x.shape[1] // 2)
        source, target = numbers(x), numbers(out)
        self.divide(len(x), x.nbytes, lambda first, last: self.kernels.swiglu_rows(
            source[first:last], target[first:last]))
        return out
