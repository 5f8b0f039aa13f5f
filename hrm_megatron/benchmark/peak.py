"""What the device at hand can do at best: its measured rate of matrix products."""
from __future__ import annotations

import statistics
import time

import torch

ROUNDS = 10


def matmul_flops_per_second(dtype: torch.dtype = torch.bfloat16, size: int = 8192) -> float:
    """Median rate of `size` x `size` matrix products on the GPU, or on the CPU where there is none."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for repeat in range(ROUNDS + 3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        a @ b
        torch.cuda.synchronize()
        if repeat >= 3:
            seconds.append(time.perf_counter() - start)
    return 2 * size ** 3 / statistics.median(seconds)
