"""Loops over single examples, compiled by numba. Import this module only where a loop runs: importing numba takes half
a second.

The machine code is cached beside the source, or in the user's cache folder if that is read-only; without either it is
compiled once per process. All loops release the GIL, so that a thread can plan while others train.
"""
from __future__ import annotations

import functools
import hashlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numba
import numpy as np
from numba import extending

Ints = np.ndarray  # [n] integers
# Its own type would demand the first argument, which numba adds, from callers.
intrinsic: Callable[[Callable[..., Any]], Callable[..., Any]] = extending.intrinsic

ROUNDS = 8  # of the Feistel network; 4 already look random on large ranges
CACHED_VALUES = 1 << 10  # processed together, so that they stay in L1 cache
LEAST_BITS = 8  # halves of one or two bits would favour some orders
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # increment of SplitMix64


@functools.cache
def _sources(module: str) -> bytes:
    """Return the source text of a module and of all modules of this package that it imports from."""
    text = Path(str(sys.modules[module].__file__)).read_bytes()
    imported = re.findall(rb"^from (hrm_megatron[.\w]*) import", text, re.MULTILINE)
    return b"".join([text, *(_sources(name.decode()) for name in imported)])


def compiled[Function: Callable[..., object]](function: Function, fastmath: bool | set[str] = False) -> Function:
    """Compile `function` at its first call. With `fastmath`, LLVM may reorder its arithmetic, and division by zero
    raises nothing: a loop that may raise is not vectorized."""
    divisions: Literal["numpy", "python"] = "numpy" if fastmath else "python"
    # numba invalidates its cache by the function's own file, not by the functions it calls: hash them into the name.
    function.__qualname__ += "-" + hashlib.sha256(_sources(function.__module__)).hexdigest()[:16]
    try:
        return numba.njit(function, cache=True, nogil=True, fastmath=fastmath, error_model=divisions)
    except RuntimeError:  # numba found no writable cache folder
        return numba.njit(function, nogil=True, fastmath=fastmath, error_model=divisions)


@compiled
def mixed(value: np.uint64) -> np.uint64:
    """Mix 64 bits one to one: the finalizer of SplitMix64."""
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@compiled
def permuted(index: np.uint64, count: np.uint64, key: np.uint64) -> np.uint64:
    """Return element `index` of the permutation of range(count) that `key` selects.

    A Feistel network permutes the smallest power-of-two range that holds `count` numbers; a result outside range(count)
    is sent through again until it is inside (cycle walking).
    """
    bits = np.uint64(LEAST_BITS)
    while bits < np.uint64(64) and (count - np.uint64(1)) >> bits:
        bits += np.uint64(1)
    low_bits = bits >> np.uint64(1)
    high_bits = bits - low_bits
    while True:
        kept_bits, changed_bits = low_bits, high_bits
        round_key = key
        for _ in range(ROUNDS):
            kept = index & ((np.uint64(1) << kept_bits) - np.uint64(1))
            changed = (index >> kept_bits) ^ (mixed(kept + round_key) >> (np.uint64(64) - changed_bits))
            index = (kept << changed_bits) | changed
            kept_bits, changed_bits = changed_bits, kept_bits  # the halves swap places, and so do their widths
            round_key += GOLDEN
        if index < count:
            return index


@compiled
def order_between(start: int, stop: int, count: int, key: np.uint64) -> Ints:
    """Return elements `start` to `stop` - 1 of the permutation of range(count), [stop - start] int64.

    Equal to `permuted` of each index, in a fifth of the time: the loops have no branches, so they vectorize, and values
    outside the range are collected for further passes.
    """
    order = np.arange(start, stop).astype(np.uint64)
    places = np.empty(stop - start, np.int64)  # indices in `order` of the values outside the range
    again = np.empty(stop - start, np.uint64)  # those values
    _send_through(order, np.uint64(count), key)
    outside = 0
    for i in range(len(order)):
        places[outside], again[outside] = i, order[i]
        outside += order[i] >= np.uint64(count)
    while outside:
        _send_through(again[:outside], np.uint64(count), key)
        left = 0
        for i in range(outside):
            place, value = places[i], again[i]
            order[place] = value
            places[left], again[left] = place, value
            left += value >= np.uint64(count)
        outside = left
    return order.view(np.int64)


@compiled
def _send_through(values: Ints, count: np.uint64, key: np.uint64) -> None:
    """Replace `values` by the result of one pass of the network of `permuted`."""
    one, all_bits = np.uint64(1), np.uint64(64)
    bits = np.uint64(LEAST_BITS)
    while bits < all_bits and (count - one) >> bits:
        bits += one
    low = bits >> one
    high = bits - low
    for start in range(0, len(values), CACHED_VALUES):
        block = values[start:start + CACHED_VALUES]
        round_key = key
        for _ in range(ROUNDS // 2):
            next_key = round_key + GOLDEN
            for i in range(len(block)):
                kept = block[i] & ((one << low) - one)
                value = (kept << high) | ((block[i] >> low) ^ (mixed(kept + round_key) >> (all_bits - high)))
                kept = value & ((one << high) - one)
                block[i] = (kept << low) | ((value >> high) ^ (mixed(kept + next_key) >> (all_bits - low)))
            round_key = next_key + GOLDEN


@compiled
def best_fit(lengths: Ints, row_tokens: int) -> tuple[Ints, int]:
    """Return the row of each example [n] and the number of rows: best-fit decreasing, i.e. longest first, each into the
    fullest row that still has room.

    Among equally full rows the first opened wins; equal lengths keep their order. Rows with the same free room form a
    list in ascending order; two levels of bit sets tell which rooms have rows.
    """
    count = len(lengths)
    row_of = np.empty(count, np.int32)
    first = np.full(row_tokens + 1, -1, np.int32)  # [room] the lowest-numbered row with that room
    last = np.full(row_tokens + 1, -1, np.int32)
    after = np.empty(count, np.int32)  # [row] the next row with the same room
    words = (row_tokens >> 6) + 1
    filled = np.zeros(words, np.uint64)  # bit r % 64 of word r // 64: there are rows with room r
    blocks = np.zeros((words >> 6) + 1, np.uint64)  # bit w % 64 of block w // 64: word w is not zero
    opened = 0
    for example in by_length(lengths, row_tokens):
        length = lengths[example]
        room = first_set(filled, blocks, length)
        if room < 0:
            row, room = opened, row_tokens
            opened += 1
        else:
            row = first[room]
            first[room] = after[row]
            if first[room] < 0:
                last[room] = -1
                word = room >> 6
                filled[word] &= ~(np.uint64(1) << np.uint64(room & 63))
                if not filled[word]:
                    blocks[word >> 6] &= ~(np.uint64(1) << np.uint64(word & 63))
        row_of[example] = row
        room -= length
        if room == 0:
            continue
        if first[room] < 0:
            first[room] = last[room] = row
            after[row] = -1
            word = room >> 6
            filled[word] |= np.uint64(1) << np.uint64(room & 63)
            blocks[word >> 6] |= np.uint64(1) << np.uint64(word & 63)
        elif row > last[room]:
            after[last[room]] = row
            after[row] = -1
            last[room] = row
        elif row < first[room]:
            after[row] = first[room]
            first[room] = row
        else:
            at = first[room]
            while after[at] < row:
                at = after[at]
            after[row] = after[at]
            after[at] = row
    return row_of, opened


@compiled
def by_length(lengths: Ints, longest: int) -> Ints:
    """Return the indices of `lengths` from longest to shortest, stable: a counting sort."""
    places = np.zeros(longest + 2, np.int32)
    for length in lengths:
        places[longest - length + 1] += 1
    for i in range(1, longest + 2):
        places[i] += places[i - 1]
    order = np.empty(len(lengths), np.int32)
    for i in range(len(lengths)):
        place = longest - lengths[i]
        order[places[place]] = i
        places[place] += 1
    return order


@compiled
def lowest_bit(word: np.uint64) -> int:
    """Return the index of the lowest set bit of a non-zero word."""
    number = 0
    for width in (32, 16, 8, 4, 2, 1):
        if not word & ((np.uint64(1) << np.uint64(width)) - np.uint64(1)):
            word >>= np.uint64(width)
            number += width
    return number


@compiled
def first_set(filled: Ints, blocks: Ints, start: int) -> int:
    """Return the index of the first set bit of `filled` at or after bit `start`, or -1."""
    word = start >> 6
    found = filled[word] >> np.uint64(start & 63)
    if found:
        return start + lowest_bit(found)
    word += 1
    block = word >> 6
    if block >= len(blocks):
        return -1
    found = blocks[block] >> np.uint64(word & 63)
    if found:
        word += lowest_bit(found)
        return (word << 6) + lowest_bit(filled[word])
    for later in range(block + 1, len(blocks)):
        if blocks[later]:
            word = (later << 6) + lowest_bit(blocks[later])
            return (word << 6) + lowest_bit(filled[word])
    return -1


@compiled
def group_by_row(ids: Ints, row_of: Ints, rows: int, key: np.uint64) -> tuple[Ints, Ints]:
    """Return the ids row by row, and the number of ids of each row; `key` selects the order of the rows.

    Within a row, ids keep their order.
    """
    place_of = np.empty(rows, np.int32)
    for row in range(rows):
        place_of[row] = permuted(np.uint64(row), np.uint64(rows), key)
    sizes = np.zeros(rows, np.int64)
    for row in row_of:
        sizes[place_of[row]] += 1
    ends = np.cumsum(sizes) - sizes
    grouped = np.empty(len(ids), ids.dtype)
    for i in range(len(ids)):
        place = place_of[row_of[i]]
        grouped[ends[place]] = ids[i]
        ends[place] += 1
    return grouped, sizes


@compiled
def draw(start: int, stop: int, epoch: int, key: np.uint64, begins: Ints, firsts: Ints, sizes: Ints, keys: Ints
         ) -> Ints:
    """Return where positions `start` to `stop` - 1 of an epoch come from, as indices into the concatenated examples of
    streams.

    Before the epoch is shuffled by `key`, stream k fills its positions `begins[k]` to `begins[k + 1]` - 1 from its
    `sizes[k]` examples, which start at `firsts[k]`: with the next ones of the stream's own walk (one permutation of its
    examples after another), or with each example equally often where the quota is a multiple of the size.
    """
    found = order_between(start, stop, begins[-1], key)
    if len(sizes) == 1 and begins[1] == sizes[0]:
        return found + firsts[0]
    for i in range(stop - start):
        place = found[i]
        k = np.searchsorted(begins, place, side="right") - 1
        quota, size = begins[k + 1] - begins[k], sizes[k]
        place -= begins[k]
        if quota % size == 0:
            at = place % size
        else:
            walked = epoch * quota + place
            own_key = mixed(np.uint64(keys[k]) + np.uint64(walked // size) * GOLDEN)
            at = np.int64(permuted(np.uint64(walked % size), np.uint64(size), own_key))
        found[i] = firsts[k] + at
    return found


@compiled
def gather(packed: Ints, places: Ints, low_bits: int, ids: Ints, lengths: Ints) -> None:
    """Unpack the `packed` numbers at `places` [n]: the low bits are lengths [n], all higher bits are ids [n]."""
    mask = (np.uint64(1) << np.uint64(low_bits)) - np.uint64(1)
    for i in range(len(places)):
        value = packed[np.uint64(places[i])]  # unsigned: no wraparound indexing
        ids[i], lengths[i] = value >> np.uint64(low_bits), value & mask


@compiled
def parts_by_key(prompt_keys: Ints, key: np.uint64, train_end: np.uint64, valid_end: np.uint64, last: int) -> Ints:
    """Return the part of each example, [n] uint8, by its mixed prompt key: 0 below `train_end`, 1 below `valid_end`.

    `last` is the part of all keys above.
    """
    parts = np.empty(len(prompt_keys), np.uint8)
    for i in range(len(prompt_keys)):
        place = mixed(mixed(prompt_keys[i]) + key)
        parts[i] = 0 if place < train_end else 1 if place < valid_end else last
    return parts
