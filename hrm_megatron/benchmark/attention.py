"""Compare the attention kernels that make two calls over all rows: their time on micro-batches of given lengths.

Many short examples are harder for a kernel than few long ones: it works in tiles of 64 or 128 queries, and some
libraries round token counts up (docs/attention.md).
"""
from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import numpy as np
import torch

from hrm_megatron.attention.core import KERNELS, PrefixLMAttention
from hrm_megatron.attention.kernel_choice import refusal
from hrm_megatron.attention.prefix_lm import PrefixSequences
from hrm_megatron.attention.rotary import Rotation
from hrm_megatron.benchmark.peak import median_seconds
from hrm_megatron.benchmark.rows import PREFIX_TOKENS, RESPONSE_TOKENS
from hrm_megatron.config import Architecture, ConfigError
from hrm_megatron.parallel.machine import Machine
from hrm_megatron.planner.flops import score_elements
from hrm_megatron.transformer_config import hrm_config

COMPARED, ELSEWHERE = ("te", "varlen", "flash"), ("cpu",)
WARMUP = 3
Pairs = list[tuple[int, int]]


def random_lengths(count: int = 512, seed: int = 0) -> Pairs:
    """Return random (prefix, response) lengths, distributed as in rows.py."""
    rng = np.random.default_rng(seed)
    prefixes, responses = (rng.integers(*bounds, count).tolist() for bounds in (PREFIX_TOKENS, RESPONSE_TOKENS))
    return list(zip(prefixes, responses, strict=True))


def fill_rows(lengths: Sequence[tuple[int, int]], row_tokens: int, rows: int) -> list[Pairs]:
    """Fill rows with the examples in order, cyclically; a row ends before the first example that does not fit."""
    if (longest := max(map(sum, lengths))) > row_tokens:
        raise ConfigError(f"--row-tokens {row_tokens}: an example has {longest}; give at least as many")
    examples, filled = itertools.cycle(lengths), [list[tuple[int, int]]() for _ in range(rows)]
    waiting = next(examples)
    for row in filled:
        used = 0
        while used + sum(waiting) <= row_tokens:
            row.append(waiting)
            used += sum(waiting)
            waiting = next(examples)
    return filled


def compare_kernels(machine: Machine, lengths: Sequence[tuple[int, int]], row_tokens: int, rows: int, heads: int,
                    head_dim: int, rounds: int) -> Iterator[str]:
    """Yield a line per kernel: time of forward, and of forward plus backward, of one layer in bf16; or why it cannot
    run."""
    filled = fill_rows(lengths, row_tokens, rows)
    examples = [pair for row in filled for pair in row]
    flops = 4 * heads * head_dim * score_elements(examples)
    mean = sum(map(sum, examples)) / max(1, len(examples))
    yield (f"micro-batch of {rows} x {row_tokens} tokens: {len(examples)} examples of {mean:.0f} tokens on average, "
           f"{heads} heads of {head_dim}")
    yield f"{'kernel':8}{'forward ms':>12}{'with backward':>15}{'TFLOP/s':>10}"
    config = hrm_config(Architecture(1, heads * head_dim, heads, 64, 256), params_dtype=torch.bfloat16, bf16=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    positions = torch.zeros(rows, row_tokens, dtype=torch.int64, device=device)
    sequences = PrefixSequences(filled, Rotation.of(positions, head_dim, 1e4), row_tokens)
    states = [torch.randn(row_tokens, rows, heads, head_dim, dtype=torch.bfloat16, device=device, requires_grad=True)
              for _ in range(3)]
    for name in COMPARED if machine.capability else (*COMPARED, *ELSEWHERE):
        if reason := refusal(name, torch.bfloat16, head_dim, machine):
            yield f"{name:8}{reason}"
            continue
        kernel = KERNELS[name](config, 1, None, "self", pg_collection=SimpleNamespace(cp=None))

        forward, seconds = _seconds_of(kernel, states, sequences, rounds)
        # Backward has five matmuls where forward has two.
        yield f"{name:8}{1e3 * forward:>12.3f}{1e3 * seconds:>15.3f}{3.5 * flops / seconds / 1e12:>10.1f}"


def _seconds_of(kernel: PrefixLMAttention, states: Sequence[torch.Tensor], sequences: PrefixSequences,
                rounds: int) -> tuple[float, float]:
    q, k, v = states

    def forward() -> torch.Tensor:
        return kernel.attend(q, k, v, sequences)

    def both() -> None:
        out = forward()
        torch.autograd.grad(out, states, out)
    with torch.no_grad():
        alone = median_seconds(forward, rounds, WARMUP)
    return alone, median_seconds(both, rounds, WARMUP)
