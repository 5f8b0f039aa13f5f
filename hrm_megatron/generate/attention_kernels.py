"""Attention to paged keys and values, compiled by numba for the CPU: all of it for one new position per answer, and for
prompts the steps before and after torch's kernel.

It reads and writes the blocks in place. torch alone would need them copied into one tensor at every tick and layer,
which costs as much memory traffic as transformers' growing cache. A bfloat16 pool is passed as its bits, uint16.
"""
from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba.extending import register_jitable

from hrm_megatron.generate.vectors import LANES, fetch, larger, load, multiply_add, store, zeros
from hrm_megatron.layers.loops import exp_of_negative, loop, sigmoid, stored, widened
from hrm_megatron.layers.threads import on_threads

LOWEST = np.float32(np.finfo(np.float32).min)
ONE = np.float32(1)


@register_jitable(inline="always")
def rotate_row(gqkv: Any, row: int, position: int, cos: Any, sin: Any, out: Any, to: int) -> None:
    """Write the rotated query and key of a row to out[0, :, to] and out[1, :, to] of out [2 or 3, heads, n, 2, d/2]."""
    for part in range(2):
        for head in range(out.shape[1]):
            for i in range(out.shape[4]):  # a single loop over both halves is not vectorized
                out[part, head, to, 0, i] = stored(out, widened(gqkv[row, 1 + part, head, 0, i]) * cos[position, i]
                                                   - widened(gqkv[row, 1 + part, head, 1, i]) * sin[position, i])
            for i in range(out.shape[4]):
                out[part, head, to, 1, i] = stored(out, widened(gqkv[row, 1 + part, head, 1, i]) * cos[position, i]
                                                   + widened(gqkv[row, 1 + part, head, 0, i]) * sin[position, i])


@register_jitable(inline="always")
def store_key(key: Any, at: int, keys: Any, block: int, place: int) -> None:
    """Write key[1, :, at], as `rotate_row` leaves it, to a position of keys [blocks, heads, 2, d/2, 16]."""
    for head in range(keys.shape[1]):
        for side in range(2):
            for i in range(keys.shape[3]):
                keys[block, head, side, i, place] = stored(keys, widened(key[1, head, at, side, i]))


@register_jitable(inline="always")
def store_value(gqkv: Any, row: int, values: Any, block: int, place: int) -> None:
    """Write the value of a row to a position of values [blocks, heads, 16, 2, d/2]."""
    for head in range(values.shape[1]):
        for side in range(2):
            for i in range(values.shape[4]):
                values[block, head, place, side, i] = gqkv[row, 3, head, side, i]


@loop
def enter_part(first: int, last: int, gqkv: Any, keys: Any, values: Any, blocks: Any, positions: Any, cos: Any,
               sin: Any, qkv: Any) -> None:
    """`enter_rows` for rows [first, last)."""
    heads, half = qkv.shape[1], qkv.shape[4]
    all_keys, all_values = keys.reshape(-1, heads, 2, half, LANES), values.reshape(-1, heads, LANES, 2, half)
    for row in range(first, last):
        rotate_row(gqkv, row, positions[row], cos, sin, qkv, row)
        store_key(qkv, row, all_keys, blocks[row], positions[row] % LANES)
        store_value(gqkv, row, all_values, blocks[row], positions[row] % LANES)
        for head in range(heads):
            for side in range(2):
                for i in range(half):
                    qkv[2, head, row, side, i] = gqkv[row, 3, head, side, i]


@loop
def enter_rows(threads: int, gqkv: Any, keys: Any, values: Any, blocks: Any, positions: Any, cos: Any, sin: Any,
               qkv: Any) -> None:
    """Rotate queries and keys of whole prompts; write queries, keys and values to qkv [3, heads, n, 2, d/2], and keys
    and values also to the cache.

    Row r is position positions[r] of a prompt, in blocks[r]; all else as in `attend_rows`.
    """
    on_threads(enter_part, threads, len(gqkv), (gqkv, keys, values, blocks, positions, cos, sin, qkv))


@loop
def gate_part(first: int, last: int, gqkv: Any, attended: Any, out: Any) -> None:
    """`gate_rows` for rows [first, last)."""
    _, heads, d = out.shape
    gates = gqkv.reshape(-1, 4, heads, d)
    for row in range(first, last):
        for head in range(heads):
            for i in range(d):
                gate = sigmoid(widened(gates[row, 0, head, i]))
                out[row, head, i] = stored(out, widened(attended[head, row, i]) * gate)


@loop
def gate_rows(threads: int, gqkv: Any, attended: Any, out: Any) -> None:
    """Write `sigmoid(gate) * attention` to out [n, heads, d]; attended is [heads, n, d], gqkv as in `attend_rows`."""
    on_threads(gate_part, threads, len(gqkv), (gqkv, attended, out))


@register_jitable(inline="always")
def score_positions(query: Any, head: int, keys: Any, start: int, ahead: Any, following: int) -> Any:
    """Return query[head] times each of the 16 keys from keys[start] on, and prefetch as many from ahead[following]
    on."""
    d = query.shape[1]
    whole = d - d % 4
    a, b, c, e = zeros(), zeros(), zeros(), zeros()  # four sums, so that no addition waits for the one before
    for i in range(0, whole, 4):
        at, then = start + i * LANES, following + i * LANES
        for j in range(4):
            fetch(ahead, then + j * LANES)
        a = multiply_add(query[head, i], load(keys, at), a)
        b = multiply_add(query[head, i + 1], load(keys, at + LANES), b)
        c = multiply_add(query[head, i + 2], load(keys, at + 2 * LANES), c)
        e = multiply_add(query[head, i + 3], load(keys, at + 3 * LANES), e)
    for i in range(whole, d):
        a = multiply_add(query[head, i], load(keys, start + i * LANES), a)
    return multiply_add(ONE, multiply_add(ONE, a, b), multiply_add(ONE, c, e))


@register_jitable(inline="always")
def weigh_values(weights: Any, head: int, number: int, count: int, total: Any, d: int, values: Any, start: int,
                 ahead: Any, following: int) -> None:
    """Add to total [heads * d], for one head, the first `count` values from values[start] on times the weights of block
    `number`; prefetch as much from ahead[following] on."""
    quads, singles = d - d % (4 * LANES), d - d % LANES
    for i in range(0, quads, 4 * LANES):
        to = head * d + i
        a, b = load(total, to), load(total, to + LANES)
        c, e = load(total, to + 2 * LANES), load(total, to + 3 * LANES)
        for p in range(count):
            at, then, weight = start + i + p * d, following + i + p * d, weights[head, number * LANES + p]
            for j in range(4):
                fetch(ahead, then + j * LANES)
            a = multiply_add(weight, load(values, at), a)
            b = multiply_add(weight, load(values, at + LANES), b)
            c = multiply_add(weight, load(values, at + 2 * LANES), c)
            e = multiply_add(weight, load(values, at + 3 * LANES), e)
        store(total, to, a)
        store(total, to + LANES, b)
        store(total, to + 2 * LANES, c)
        store(total, to + 3 * LANES, e)
    for i in range(quads, singles, LANES):
        found = load(total, head * d + i)
        for p in range(count):
            fetch(ahead, following + i + p * d)
            found = multiply_add(weights[head, number * LANES + p], load(values, start + i + p * d), found)
        store(total, head * d + i, found)
    for p in range(count):
        for i in range(singles, d):
            total[head * d + i] += weights[head, number * LANES + p] * widened(values[start + p * d + i])


@register_jitable
def score_row(rotated: Any, keys: Any, values: Any, table: Any, position: int, weights: Any) -> None:
    """Write the query's scores over all positions to weights [heads, n * 16], and the new key to the cache."""
    _, heads, _, _, half = rotated.shape
    query, scores, size = rotated.reshape(2 * heads, 2 * half), weights.reshape(-1), heads * 2 * half * LANES
    blocks = position // LANES + 1
    for number in range(blocks):
        block, final = table[number] * size, number + 1 == blocks
        if final:
            store_key(rotated, 0, keys.reshape(-1, heads, 2, half, LANES), table[number], position % LANES)
        ahead, then = (values, table[0] * size) if final else (keys, table[number + 1] * size)
        for head in range(heads):
            at = head * 2 * half * LANES
            store(scores, head * weights.shape[1] + number * LANES,
                  score_positions(query, head, keys, block + at, ahead, then + at))


@register_jitable
def weigh_scores(weights: Any, positions: int, scale: Any, sums: Any) -> None:
    """Replace scores [heads, n * 16] by `exp(scale * (score - largest))` and write their sums. They are not divided by
    the sum: the quotients may be denormal, which is slow."""
    most, scores, count = np.empty(LANES, np.float32), weights.reshape(-1), -(-positions // LANES) * LANES
    for head in range(weights.shape[0]):
        weights[head, positions:count] = LOWEST
        lanes = load(scores, head * weights.shape[1])
        for p in range(LANES, count, LANES):
            lanes = larger(lanes, load(scores, head * weights.shape[1] + p))
        store(most, 0, lanes)
        largest, weight = most.max(), np.float32(0)
        for p in range(count):
            weights[head, p] = exp_of_negative((weights[head, p] - largest) * scale)
            weight += weights[head, p]
        sums[head] = weight


@register_jitable
def weigh_row(weights: Any, gqkv: Any, row: int, values: Any, keys: Any, table: Any, position: int, following: int,
              total: Any) -> None:
    """Write the weighted sums of values to total [heads * d] and the row's new value to the cache; prefetch block
    `following` of the keys."""
    _, _, heads, _, half = gqkv.shape
    d, size, blocks = 2 * half, heads * 2 * half * LANES, position // LANES + 1
    total[:] = 0
    for number in range(blocks):
        block, final, count = table[number] * size, number + 1 == blocks, LANES
        if final:
            count = position % LANES + 1
            store_value(gqkv, row, values.reshape(-1, heads, LANES, 2, half), table[number], position % LANES)
        ahead, then = (keys, following * size) if final else (values, table[number + 1] * size)
        for head in range(heads):
            at = head * d * LANES
            weigh_values(weights, head, number, count, total, d, values, block + at, ahead, then + at)
            for i in range(count * d, d * LANES, LANES):
                fetch(ahead, then + at + i)


@loop
def attend_part(first: int, last: int, gqkv: Any, keys: Any, values: Any, tables: Any, lengths: Any, cos: Any, sin: Any,
                out: Any) -> None:
    """`attend_rows` for rows [first, last)."""
    _, _, heads, _, half = gqkv.shape
    scale = np.float32(1 / math.sqrt(2 * half))
    rotated, total = np.empty((2, heads, 1, 2, half), np.float32), np.empty(heads * 2 * half, np.float32)
    weights, sums = np.empty((heads, tables.shape[1] * LANES), np.float32), np.empty(heads, np.float32)
    gates, totals = gqkv.reshape(-1, 4, 2 * half * heads), total.reshape(heads, 2 * half)
    for row in range(first, last):
        rotate_row(gqkv, row, lengths[row], cos, sin, rotated, 0)
        score_row(rotated, keys, values, tables[row], lengths[row], weights)
        weigh_scores(weights, lengths[row] + 1, scale, sums)
        weigh_row(weights, gqkv, row, values, keys, tables[row], lengths[row], tables[min(row + 1, last - 1), 0], total)
        for head in range(heads):
            for i in range(2 * half):
                totals[head, i] /= sums[head]
        for i in range(out.shape[1]):
            out[row, i] = stored(out, total[i] * sigmoid(widened(gates[row, 0, i])))


@loop
def attend_rows(threads: int, gqkv: Any, keys: Any, values: Any, tables: Any, lengths: Any, cos: Any, sin: Any,
                out: Any) -> None:
    """Attend from one new position of each row, and add its key and value to the cache.

    gqkv [b, 4, heads, 2, d/2] is [gate | query | key | value], not rotated, each head in halves; keys [blocks, heads,
    d, 16] and values [blocks, heads, 16, d], both flat; tables [b, n] the blocks of each row, lengths [b] its positions
    so far; cos, sin [context, d/2]; out [b, heads * d] gets `sigmoid(gate) * attention`.

    Scores are computed for the 16 positions of a block at once, weighted values for 16 elements of a head at once; the
    heads of a block are contiguous and read in order. While a block is read, the next is prefetched line by line:
    blocks are scattered, so hardware prefetchers cannot predict them. The new position is written after its block has
    been loaded, since stores that miss the cache soon stall all loads.

    numba vectorizes only loops whose indices come from a `range` or a constant, since others may be negative and wrap
    around. The parts of a row are separate functions because one large function is compiled to slower code.
    """
    on_threads(attend_part, threads, len(gqkv), (gqkv, keys, values, tables, lengths, cos, sin, out))
