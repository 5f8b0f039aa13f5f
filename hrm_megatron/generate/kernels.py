"""Attention of one new position per answer to its paged keys and values, compiled by numba for the CPU.

It reads the blocks where they lie. With torch alone they would first be copied side by side at every tick and layer,
which costs as much memory traffic as transformers' growing cache does. A pool of bfloat16 comes as its bits, uint16.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba.extending import overload, register_jitable

from hrm_megatron.data.kernels import compiled

# Sums in any order and fused multiply-adds; NaN and infinity keep their meaning.
ANY_ORDER = {"reassoc", "contract", "arcp", "nsz"}
LOWEST = np.float32(np.finfo(np.float32).min)
HALF = np.uint32(0x7FFF)
LOG2_E, LN_2 = np.float32(math.log2(math.e)), np.float32(math.log(2))
SMALLEST = np.float32(-87)  # its exponential is still a normal number
# exp(x) = sum of x^n / n!: behind these terms less than 1e-8 of the whole for |x| <= ln(2) / 2
C1, C2, C3, C4, C5, C6, C7 = (np.float32(1 / math.factorial(n)) for n in range(1, 8))


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return compiled(function, ANY_ORDER)


def widened(x: Any) -> Any:
    """Return the float32 of an element of the pool."""
    raise NotImplementedError  # only compiled


def stored(pool: Any, x: Any) -> Any:
    """Return the float32 x as an element of the pool."""
    raise NotImplementedError  # only compiled


@overload(widened)
def _widened(x: Any) -> Any:  # numba compares parameters with their annotations
    def of_bits(x: Any) -> Any:
        return np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)

    def of_float(x: Any) -> Any:
        return x
    return of_bits if x == numba.uint16 else of_float


@overload(stored)
def _stored(pool: Any, x: Any) -> Any:
    def as_bits(pool: Any, x: Any) -> Any:
        return _rounded(x)

    def as_float(pool: Any, x: Any) -> Any:
        return x
    return as_bits if pool.dtype == numba.uint16 else as_float


@register_jitable
def _rounded(x: Any) -> Any:
    """Round a float32 to the nearest bfloat16, ties to even, and return its bits."""
    bits = np.float32(x).view(np.uint32)
    return np.uint16((bits + HALF + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16))


@register_jitable
def exp_of_negative(x: Any) -> Any:
    """Return the exponential of a float32 that is not positive, to 1e-7 of 1: what a compiler can vectorize."""
    x = SMALLEST if x < SMALLEST else x
    power = x * LOG2_E
    whole = np.int32(power - np.float32(0.5))  # rounds to nearest, since it truncates towards zero
    r = (power - np.float32(whole)) * LN_2
    part = np.float32(1) + r * (C1 + r * (C2 + r * (C3 + r * (C4 + r * (C5 + r * (C6 + r * C7))))))
    return part * np.int32((whole + np.int32(127)) << np.int32(23)).view(np.float32)


@register_jitable
def sigmoid(x: Any) -> Any:
    e = exp_of_negative(-abs(x))
    return (np.float32(1) if x >= 0 else e) / (np.float32(1) + e)


@_compiled
def attend_rows(gqkv: Any, keys: Any, values: Any, tables: Any, lengths: Any, cos: Any, sin: Any, first: int,
                last: int, out: Any) -> None:
    """Attend from one new position of each row in [first, last), whose key and value are added to the cache.

    gqkv [b, 4 h] in float32 are [gate | query | key | value], not rotated; keys and values [blocks, heads, positions,
    d]; tables [b, n] the blocks of each row, lengths [b] its positions so far; cos, sin [context, d/2]; out [b, h]
    gets `sigmoid(gate) * attention` in float32.
    """
    _, heads, block_tokens, d = keys.shape
    half, width = d // 2, heads * d
    scale = np.float32(1 / math.sqrt(d))
    query, total = np.empty(d, np.float32), np.empty(d, np.float32)
    scores = np.empty(tables.shape[1] * block_tokens, np.float32)
    for row in range(first, last):
        position = lengths[row]
        own, place = tables[row, position // block_tokens], position % block_tokens
        blocks = position // block_tokens + 1
        for head in range(heads):
            start = head * d
            for i in range(half):
                c, s = cos[position, i], sin[position, i]
                a, b = gqkv[row, width + start + i], gqkv[row, width + start + half + i]
                query[i], query[half + i] = (a * c - b * s) * scale, (b * c + a * s) * scale
                a, b = gqkv[row, 2 * width + start + i], gqkv[row, 2 * width + start + half + i]
                keys[own, head, place, i] = stored(keys, a * c - b * s)
                keys[own, head, place, half + i] = stored(keys, b * c + a * s)
            for i in range(d):
                values[own, head, place, i] = stored(values, gqkv[row, 3 * width + start + i])
                total[i] = 0
            largest = LOWEST
            for number in range(blocks):
                block = keys[tables[row, number], head]
                for p in range(min(block_tokens, position + 1 - number * block_tokens)):
                    score = np.float32(0)
                    for i in range(d):
                        score += query[i] * widened(block[p, i])
                    scores[number * block_tokens + p] = score
                    largest = max(largest, score)
            weights = np.float32(0)
            for p in range(position + 1):
                scores[p] = exp_of_negative(scores[p] - largest)
                weights += scores[p]
            for number in range(blocks):
                block = values[tables[row, number], head]
                for p in range(min(block_tokens, position + 1 - number * block_tokens)):
                    weight = scores[number * block_tokens + p]
                    for i in range(d):
                        total[i] += weight * widened(block[p, i])
            for i in range(d):
                out[row, start + i] = total[i] / weights * sigmoid(gqkv[row, start + i])
