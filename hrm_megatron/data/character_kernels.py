"""numba loops over the UTF-8 of a batch of texts, compiled like those of kernels.py. The input must be well-formed
UTF-8, as Python encodes it: nothing is checked here."""
from __future__ import annotations

import numpy as np

from hrm_megatron.data.kernels import compiled

Bytes = np.ndarray  # [n] uint8


@compiled
def character_at(utf8: Bytes, at: int) -> tuple[np.int64, int]:
    """Return the code point of the character at byte `at`, and the byte at which the next one begins."""
    first = np.int64(utf8[at])
    if first < 0x80:
        return first, at + 1
    second = np.int64(utf8[at + 1]) & 0x3F
    if first < 0xE0:
        return (first & 0x1F) << 6 | second, at + 2
    third = np.int64(utf8[at + 2]) & 0x3F
    if first < 0xF0:
        return (first & 0xF) << 12 | second << 6 | third, at + 3
    return (first & 0x7) << 18 | second << 12 | third << 6 | np.int64(utf8[at + 3]) & 0x3F, at + 4


@compiled
def kinds_of_texts(utf8: Bytes, ends: np.ndarray, table: Bytes) -> Bytes:
    """Return the OR of the kinds of each text's characters, [texts] uint8. Text i ends before byte `ends[i]`, where the
    next one begins. `table` has the kind of every code point."""
    kinds = np.zeros(len(ends), np.uint8)
    at = 0
    for text in range(len(ends)):
        found = 0
        while at < ends[text]:
            code, at = character_at(utf8, at)
            found |= table[code]
        kinds[text] = found
    return kinds


@compiled
def stripped_texts(utf8: Bytes, ends: np.ndarray, table: Bytes, kind: int) -> np.ndarray:
    """Return begin and end of each text without characters of `kind` at its ends, [texts, 2] int64."""
    found = np.empty((len(ends), 2), np.int64)
    start = 0
    for text in range(len(ends)):
        first, end = start, ends[text] - 1
        while first < end:
            code, behind = character_at(utf8, first)
            if not table[code] & kind:
                break
            first = behind
        while first < end:
            last = end - 1
            while utf8[last] & 0xC0 == 0x80:
                last -= 1
            code, _ = character_at(utf8, last)
            if not table[code] & kind:
                break
            end = last
        found[text, 0], found[text, 1] = first, end
        start = ends[text]
    return found


@compiled
def stretches_of_kind(utf8: Bytes, ends: np.ndarray, table: Bytes, kinds: Bytes, kind: int) -> np.ndarray:
    """Return the maximal runs of characters of `kind`, [runs, 3] int64: text, first byte, end byte. A run includes the
    character before it, if the text has one. Characters of `kind` must take at least two bytes; `kinds` are those of
    the texts."""
    found = np.empty((len(utf8) // 2 + 1, 3), np.int64)  # untouched pages cost no physical memory
    count = 0
    for text in range(len(ends)):
        if not kinds[text] & kind:
            continue
        at = before = ends[text - 1] if text else 0
        inside = False
        while at < ends[text]:
            start = at
            code, at = character_at(utf8, start)
            if table[code] & kind:
                if not inside:
                    found[count, 0], found[count, 1] = text, before
                    count += 1
                found[count - 1, 2] = at
                inside = True
            else:
                inside = False
            before = start
    return found[:count].copy()


@compiled
def places_of_triples(utf8: Bytes, wanted: np.ndarray, lowest: int) -> np.ndarray:
    """Return where a wanted triple of bytes begins, [places] int64. `wanted` [n, 256, 256] bool is indexed by the first
    byte minus `lowest`, and by the two bytes after it."""
    found = np.empty(len(utf8), np.int64)  # as above
    count = 0
    for at in range(len(utf8) - 2):
        first = np.int64(utf8[at]) - lowest
        if 0 <= first < len(wanted) and wanted[first, utf8[at + 1], utf8[at + 2]]:
            found[count] = at
            count += 1
    return found[:count].copy()
