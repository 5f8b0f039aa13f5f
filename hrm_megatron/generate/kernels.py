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
from hrm_megatron.generate.vectors import LANES, fetch, load, multiply_add, store, zeros

# Sums in any order and fused multiply-adds; NaN and infinity keep their meaning.
ANY_ORDER = {"reassoc", "contract", "arcp", "nsz"}
LOWEST = np.float32(np.finfo(np.float32).min)
HALF = np.uint32(0x7FFF)
LOG2_E, LN_2 = np.float32(math.log2(math.e)), np.float32(math.log(2))
LINE_BYTES = 64
FETCHED_BYTES = 1 << 15  # a processor's first cache
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


@register_jitable
def fetch_all(array: Any, start: int, count: int) -> None:
    """Have array[start : start + count] fetched."""
    for i in range(0, count, LINE_BYTES // array.itemsize):
        fetch(array, start + i)


@_compiled
def attend_rows(gqkv: Any, keys: Any, values: Any, tables: Any, lengths: Any, cos: Any, sin: Any, first: int,
                last: int, out: Any) -> None:
    """Attend from one new position of each row in [first, last), whose key and value are added to the cache.

    gqkv [b, 4 h] are [gate | query | key | value], not rotated; keys [blocks, heads, d, 16] and values [blocks, heads,
    16, d], both flat; tables [b, n] the blocks of each row, lengths [b] its positions so far; cos, sin [context, d/2];
    out [b, h] gets `sigmoid(gate) * attention`.

    Scores are made for the 16 positions of a block at once, values weighed for 16 elements of a head at once; the
    heads of a block lie side by side, and are read so. While a small block is read the next is fetched: blocks lie
    anywhere, and no processor guesses where. A large one would push out what is being read.
    """
    half, width = cos.shape[1], gqkv.shape[1] // 4
    d = 2 * half
    heads, whole, size = width // d, d - d % LANES, width * LANES
    ahead = d * LANES if size * keys.itemsize <= FETCHED_BYTES else 0
    scale = np.float32(1 / math.sqrt(d))
    query, total, sums = np.empty(width, np.float32), np.empty(width, np.float32), np.empty(heads, np.float32)
    weights = np.empty((heads, tables.shape[1] * LANES), np.float32)
    scores, most = weights.reshape(-1), weights.shape[1]
    for row in range(first, last):
        position = lengths[row]
        place, blocks = position % LANES, position // LANES + 1
        own = tables[row, position // LANES] * size
        for head in range(heads):
            for i in range(half):
                c, s, at = cos[position, i], sin[position, i], head * d + i
                a, b = widened(gqkv[row, width + at]), widened(gqkv[row, width + half + at])
                query[at], query[half + at] = (a * c - b * s) * scale, (b * c + a * s) * scale
                a, b = widened(gqkv[row, 2 * width + at]), widened(gqkv[row, 2 * width + half + at])
                keys[own + at * LANES + place] = stored(keys, a * c - b * s)
                keys[own + (half + at) * LANES + place] = stored(keys, b * c + a * s)
            for i in range(d):
                values[own + (head * LANES + place) * d + i] = stored(
                    values, widened(gqkv[row, 3 * width + head * d + i]))
        for number in range(blocks):
            block = tables[row, number] * size
            for head in range(heads):
                if number + 1 < blocks:
                    fetch_all(keys, tables[row, number + 1] * size + head * d * LANES, ahead)
                else:
                    fetch_all(values, tables[row, 0] * size + head * d * LANES, ahead)
                found = zeros()
                for i in range(head * d, head * d + d):
                    found = multiply_add(query[i], load(keys, block + i * LANES), found)
                store(scores, head * most + number * LANES, found)
        for head in range(heads):
            # Sums of weights stay undivided: quotients may be so small that a processor takes long over them.
            largest, weight = LOWEST, np.float32(0)
            for p in range(position + 1):
                largest = max(largest, weights[head, p])
            for p in range(position + 1):
                weights[head, p] = exp_of_negative(weights[head, p] - largest)
                weight += weights[head, p]
            sums[head] = weight
        total[:] = 0
        for number in range(blocks):
            block, count = tables[row, number] * size, min(LANES, position + 1 - number * LANES)
            for head in range(heads):
                start = block + head * LANES * d
                if number + 1 < blocks:
                    fetch_all(values, tables[row, number + 1] * size + head * LANES * d, ahead)
                elif row + 1 < last:
                    fetch_all(keys, tables[row + 1, 0] * size + head * LANES * d, ahead)
                for i in range(0, whole, LANES):
                    found = load(total, head * d + i)
                    for p in range(count):
                        found = multiply_add(weights[head, number * LANES + p], load(values, start + p * d + i), found)
                    store(total, head * d + i, found)
                for p in range(count):
                    for i in range(whole, d):
                        total[head * d + i] += weights[head, number * LANES + p] * widened(values[start + p * d + i])
        for head in range(heads):
            for i in range(head * d, head * d + d):
                out[row, i] = stored(out, total[i] / sums[head] * sigmoid(widened(gqkv[row, i])))


@_compiled
def norm_rows(x: Any, epsilon: Any, out: Any) -> None:
    """Write `x / sqrt(mean(x^2) + epsilon)` over the last axis of x [n, h] to out."""
    n, h = x.shape
    for row in range(n):
        squares = np.float32(0)
        for i in range(h):
            squares += widened(x[row, i]) * widened(x[row, i])
        factor = np.float32(1) / np.sqrt(squares / np.float32(h) + epsilon)
        for i in range(h):
            out[row, i] = stored(out, widened(x[row, i]) * factor)


@_compiled
def swiglu_rows(x: Any, out: Any) -> None:
    """Write `silu(a) * b` of the halves [a | b] of x [n, 2 ffn] to out [n, ffn]."""
    n, ffn = out.shape
    for row in range(n):
        for i in range(ffn):
            a = widened(x[row, i])
            out[row, i] = stored(out, a * sigmoid(a) * widened(x[row, ffn + i]))
