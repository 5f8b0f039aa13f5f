"""numba loops over lines of JSON, compiled like those of kernels.py: they find the wanted texts in plain rows.

A line is plain if it is blank, or one RFC 8259 object in UTF-8 that is unambiguous: no escapes in keys; each wanted
field occurs once and is a string, and no field is present that would change its meaning; no lone surrogates; short
numbers, shallow nesting. Every function returns -1 for anything else, without telling the reasons apart. Only
whitespace between lines may consume a newline, and the input ends with one, so no loop runs past the end.
"""
from __future__ import annotations

import numpy as np

from hrm_megatron.data.kernels import compiled

Bytes = np.ndarray  # [n] uint8

NEWLINE, TAB, RETURN, SPACE, QUOTE, BACKSLASH, COMMA, COLON, MINUS, PLUS, POINT, ZERO, NINE = map(
    ord, "\n\t\r \"\\,:-+.09")
BRACE, BRACKET, BRACE_END, BRACKET_END = map(ord, "{[}]")
SMALL_E, LARGE_E, SMALL_N, SMALL_U = map(ord, "eEnu")
ESCAPES = np.zeros(256, np.uint8)  # the character after a backslash -> what it stands for
for escape, character in zip('"\\/bfnrt', '"\\/\b\f\n\r\t', strict=True):
    ESCAPES[ord(escape)] = ord(character)
HEX = np.full(256, -1, np.int64)
for digit in "0123456789abcdefABCDEF":
    HEX[ord(digit)] = int(digit, 16)
WORDS = np.frombuffer(b"true false null ", np.uint8)
MOST_DEPTH = 60  # Python accepts hundreds
MOST_DIGITS = 300  # Python accepts thousands


@compiled
def behind_space(octets: Bytes, at: int) -> int:
    while octets[at] == SPACE or octets[at] == TAB or octets[at] == RETURN:
        at += 1
    return at


@compiled
def hex_at(octets: Bytes, at: int) -> int:
    """Return the value of four hexadecimal digits."""
    code = 0
    for i in range(4):
        digit = HEX[octets[at + i]]
        if digit < 0:
            return -1
        code = code << 4 | digit
    return code


@compiled
def escaped(octets: Bytes, at: int) -> tuple[int, int]:
    """Return the code point of the escape that begins at a backslash, and the end of the escape."""
    letter = octets[at + 1]
    if letter != SMALL_U:
        return (int(ESCAPES[letter]) if ESCAPES[letter] else -1), at + 2
    code = hex_at(octets, at + 2)
    if code & ~0x7FF != 0xD800:  # not a surrogate
        return code, at + 6
    if code >= 0xDC00 or octets[at + 6] != BACKSLASH or octets[at + 7] != SMALL_U:
        return -1, at
    low = hex_at(octets, at + 8)
    return (0x10000 + ((code & 0x3FF) << 10 | low & 0x3FF) if low & ~0x3FF == 0xDC00 else -1), at + 12


@compiled
def behind_character(octets: Bytes, at: int) -> int:
    """Return the end of a well-formed character of two or more bytes (Unicode, table 3-7)."""
    first, second = octets[at], octets[at + 1]
    if first < 0xC2 or first > 0xF4 or second & 0xC0 != 0x80:
        return -1
    if first < 0xE0:
        return at + 2
    if octets[at + 2] & 0xC0 != 0x80:
        return -1
    if first < 0xF0:
        return -1 if (first == 0xE0 and second < 0xA0) or (first == 0xED and second >= 0xA0) else at + 3
    if octets[at + 3] & 0xC0 != 0x80 or (first == 0xF0 and second < 0x90) or (first == 0xF4 and second >= 0x90):
        return -1
    return at + 4


@compiled
def behind_string(octets: Bytes, at: int) -> int:
    at += 1
    while octets[at] != QUOTE:
        if octets[at] < SPACE:
            return -1
        if octets[at] == BACKSLASH:
            code, at = escaped(octets, at)
            if code < 0:
                return -1
        elif octets[at] < 0x80:
            at += 1
        else:
            at = behind_character(octets, at)
            if at < 0:
                return -1
    return at + 1


@compiled
def behind_digits(octets: Bytes, at: int) -> int:
    start = at
    while ZERO <= octets[at] <= NINE:
        at += 1
    return at if at > start else -1


@compiled
def behind_word(octets: Bytes, at: int) -> int:
    """Return the end of a number or of `true`, `false`, `null`."""
    start = length = 0
    for i in range(len(WORDS)):
        if WORDS[i] != SPACE:
            length += octets[at + length] == WORDS[i]
        elif length == i - start:
            return at + length
        else:
            start, length = i + 1, 0
    start = at
    if octets[at] == MINUS:
        at += 1
    at = at + 1 if octets[at] == ZERO else behind_digits(octets, at)
    if at >= 0 and octets[at] == POINT:
        at = behind_digits(octets, at + 1)
    if at >= 0 and (octets[at] == SMALL_E or octets[at] == LARGE_E):
        at += 1
        if octets[at] == MINUS or octets[at] == PLUS:
            at += 1
        at = behind_digits(octets, at)
    return at if at - start <= MOST_DIGITS else -1


@compiled
def behind_key(octets: Bytes, at: int) -> int:
    """Return the position after the colon of a key."""
    if octets[at] != QUOTE:
        return -1
    end = behind_string(octets, at)
    for i in range(at, end):
        if octets[i] == BACKSLASH:
            return -1
    if end < 0:
        return -1
    at = behind_space(octets, end)
    return at + 1 if octets[at] == COLON else -1


@compiled
def field_at(octets: Bytes, at: int, names: Bytes, name_ends: np.ndarray) -> int:
    """Return the index of the name (with its quotes) that begins at a byte, or -1."""
    start = 0
    for field in range(len(name_ends)):
        length = name_ends[field] - start
        i = 0
        while i < length and octets[at + i] == names[start + i]:
            i += 1
        if i == length:
            return field
        start = name_ends[field]
    return -1


@compiled
def behind_row(octets: Bytes, at: int, names: Bytes, name_ends: np.ndarray, found: np.ndarray) -> int:
    """Return the end of the object that begins at a byte. `found` [2 x fields] receives begin and end of the fields'
    texts. `names` beyond those fields are fields that a plain row may hold once, empty or null."""
    for i in range(len(found)):
        found[i] = -1
    depth = 0
    objects = 0  # a bit per open level, the innermost lowest: 1 for an object, 0 for a list
    field = -1
    empties = 0  # a bit per field beyond those of `found`
    while True:
        if objects & 1:
            field = field_at(octets, at, names, name_ends) if depth == 1 else -1
            at = behind_key(octets, at)
            if at < 0:
                return -1
            at = behind_space(octets, at)
            if 2 * field >= len(found):
                if empties >> field & 1 or (octets[at] != SMALL_N
                                            and not (octets[at] == QUOTE and octets[at + 1] == QUOTE)):
                    return -1
                empties |= 1 << field
                field = -1
        start = at
        empty = False
        if octets[at] == QUOTE:
            at = behind_string(octets, at)
            if field >= 0:
                if found[2 * field] >= 0:
                    return -1
                found[2 * field], found[2 * field + 1] = start + 1, at - 1
        elif field >= 0:
            return -1
        elif octets[at] == BRACE or octets[at] == BRACKET:
            if depth == MOST_DEPTH:
                return -1
            depth += 1
            objects = objects << 1 | (octets[at] == BRACE)
            at = behind_space(octets, at + 1)
            empty = octets[at] == (BRACE_END if objects & 1 else BRACKET_END)
            if not empty:
                continue
        else:
            at = behind_word(octets, at)
        if at < 0:
            return -1
        while True:
            at = behind_space(octets, at)
            if octets[at] == COMMA:
                at = behind_space(octets, at + 1)
                break
            if octets[at] != (BRACE_END if objects & 1 else BRACKET_END):
                return -1
            at += 1
            depth -= 1
            objects >>= 1
            if not depth:
                return at


@compiled
def rows_of_lines(octets: Bytes, names: Bytes, name_ends: np.ndarray, max_row_bytes: int, found: np.ndarray,
                  lines: np.ndarray) -> int:
    """Fill `found` [rows, 2 x fields] with begin and end of the texts (-1 where the first field is missing) and `lines`
    with the line of each row; return the number of rows."""
    rows = line = at = 0
    while at < len(octets):
        start = at
        at = behind_space(octets, at)
        if octets[at] != NEWLINE:
            if octets[at] != BRACE:
                return -1
            at = behind_row(octets, at, names, name_ends, found[rows])
            if at < 0:
                return -1
            for i in range(2, found.shape[1]):
                if found[rows, i] < 0:
                    return -1
            at = behind_space(octets, at)
            lines[rows] = line
            rows += 1
        if octets[at] != NEWLINE or at - start > max_row_bytes:
            return -1
        line += 1
        at += 1
    return rows


@compiled
def join_texts(octets: Bytes, spans: np.ndarray, joined: Bytes, ends: np.ndarray) -> int:
    """Write the texts of spans [texts, 2] to `joined`, unescaped and each followed by a NUL; `ends` receives where the
    next text begins. Return the bytes written."""
    to = 0
    for text in range(len(spans)):
        at, end = spans[text, 0], spans[text, 1]
        while at < end:
            if octets[at] != BACKSLASH:
                joined[to] = octets[at]
                at += 1
                to += 1
                continue
            code, at = escaped(octets, at)
            if code < 0x80:
                joined[to] = code
                to += 1
            elif code < 0x800:
                joined[to] = 0xC0 | code >> 6
                joined[to + 1] = 0x80 | code & 0x3F
                to += 2
            elif code < 0x10000:
                joined[to] = 0xE0 | code >> 12
                joined[to + 1] = 0x80 | code >> 6 & 0x3F
                joined[to + 2] = 0x80 | code & 0x3F
                to += 3
            else:
                joined[to] = 0xF0 | code >> 18
                joined[to + 1] = 0x80 | code >> 12 & 0x3F
                joined[to + 2] = 0x80 | code >> 6 & 0x3F
                joined[to + 3] = 0x80 | code & 0x3F
                to += 4
        joined[to] = 0
        to += 1
        ends[text] = to
    return to
