"""Measure the peak rate of matmuls on this device."""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from hrm_megatron.parallel.processor import matmul

ROUNDS = 10
SHORTEST_ROW = 2048


def median_seconds(run: Callable[[], object], rounds: int, warmup: int) -> float:
    """Return the median seconds of `run` on the device over `rounds` calls, after `warmup` calls."""
    seconds = []
    for _ in range(warmup + rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[warmup:])


def in_the_longest_row_that_fits(seconds_of: Callable[[int], float], row_tokens: int) -> tuple[int, float] | None:
    """Return (row length, `seconds_of` it): `row_tokens`, halved each time memory runs out; None if even rows near
    SHORTEST_ROW do not fit."""
    while True:
        try:
            return row_tokens, seconds_of(row_tokens)
        except torch.OutOfMemoryError:
            print(f"rows of {row_tokens} tokens: out of memory", flush=True)
        if row_tokens < 2 * SHORTEST_ROW:
            return None
        row_tokens //= 2
        torch.cuda.empty_cache()  # memory of the failed attempt, whose tensors are freed


def matmul_flops_per_second(dtype: torch.dtype = torch.bfloat16, size: int = 8192) -> float:
    """Return the median FLOP/s of `size` x `size` matmuls on the GPU, or on a CPU with the faster library."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size ** 3 / median_seconds(lambda: matmul(a, b), ROUNDS, warmup=3)
