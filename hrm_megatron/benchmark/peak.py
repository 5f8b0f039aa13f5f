"""What the device at hand can do at best: its measured rate of matrix products."""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

ROUNDS = 10


def median_seconds(run: Callable[[], object], rounds: int, warmup: int) -> float:
    """Median time of `run` on the device over `rounds` calls, after `warmup` that do not count."""
    seconds = []
    for _ in range(warmup + rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[warmup:])


def matmul_flops_per_second(dtype: torch.dtype = torch.bfloat16, size: int = 8192) -> float:
    """Median rate of `size` x `size` matrix products on the GPU, or on the CPU where there is none."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size ** 3 / median_seconds(lambda: a @ b, ROUNDS, warmup=3)
