"""What the device at hand can do at best: its measured rate of matmuls."""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from hrm_megatron.parallel.processor import matmul

ROUNDS = 10
SHORTEST_ROW = 2048


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


def in_the_longest_row_that_fits(seconds_of: Callable[[int], float], row_tokens: int) -> tuple[int, float] | None:
    """Return a row's length and `seconds_of` it: `row_tokens`, or half of it as often as memory runs out; None if even
    rows near SHORTEST_ROW do not fit."""
    while True:
        try:
            return row_tokens, seconds_of(row_tokens)
        except torch.OutOfMemoryError:
            print(f"rows of {row_tokens} tokens: out of memory", flush=True)
        if row_tokens < 2 * SHORTEST_ROW:
            return None
        row_tokens //= 2
        torch.cuda.empty_cache()  # of the attempt, whose tensors are gone by now


def matmul_flops_per_second(dtype: torch.dtype = torch.bfloat16, size: int = 8192) -> float:
    """Median rate of `size` x `size` matmuls on the GPU, or on the CPU where there is none, by the faster library."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size ** 3 / median_seconds(lambda: matmul(a, b), ROUNDS, warmup=3)
