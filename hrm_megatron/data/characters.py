"""Texts of a batch, and the classes of their characters, looked up for the whole batch at once.

Texts stay in the UTF-8 in which they are read, hashed and encoded; a str is made only on request. One table look-up per
character finds texts not in NFC, unassigned code points, texts without visible characters, whitespace and replacement
characters.
"""
from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache, cached_property
from typing import overload

import numpy as np

CODE_POINTS = 0x110000
PRIVATE_PLANES = 0xF0000
INVISIBLE = re.compile(r"[\s\x00-\x1f\x7f\u00ad\u200b-\u200f\u2060\ufeff]")
LOST_MARK = "\ufffd"
HANGUL_SECOND = (*range(0x1161, 0x1176), *range(0x11A8, 0x11C3))  # vowels and finals, which compose by arithmetic
# Classes of a character, as bits.
UNASSIGNED = 1  # not in this Python's Unicode, or in a private plane
UNSURE = 2  # may change, reorder or compose in NFC; a text without any is in NFC (UAX 15, quick check)
PRECOMPOSED = 4  # NFD decomposes it
VISIBLE = 8
LOST = 16
CONTROL = 32  # JSON decodes a backslash and a letter to it
SPACE = 64  # stripped by str.strip
CONTROLS = "\b\t\n\f\r"


class Texts(Sequence[str]):
    """The texts of a batch, as one UTF-8 buffer."""

    def __init__(self, joined: bytes, ends: np.ndarray) -> None:
        """`joined`: UTF-8 of the texts, each followed by a NUL; `ends` [texts] int64: where the next one begins."""
        self.joined = joined
        self.ends = ends

    @classmethod
    def of(cls, texts: Iterable[str]) -> Texts:
        """Build from strings; a `Texts` is returned as it is. Raises UnicodeEncodeError at a lone surrogate."""
        if isinstance(texts, Texts):
            return texts
        utf8 = [text.encode() for text in texts]
        batch = cls(b"\0".join((*utf8, b"")), np.cumsum(np.fromiter(map(len, utf8), np.int64, len(utf8)) + 1))
        batch.utf8 = utf8
        return batch

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        found = self.utf8[index]
        return found.decode() if isinstance(found, bytes) else [text.decode() for text in found]

    @cached_property
    def utf8(self) -> list[bytes]:
        ends = self.ends.tolist()
        return [self.joined[start:end - 1] for start, end in zip([0, *ends], ends, strict=False)]

    @property
    def octets(self) -> np.ndarray:
        """`joined` as an array, [bytes] uint8."""
        return np.frombuffer(self.joined, np.uint8)

    @cached_property
    def kinds(self) -> np.ndarray:
        """The OR of the classes of each text's characters, [texts] uint8."""
        if not self:
            return np.empty(0, np.uint8)
        from hrm_megatron.data.character_kernels import kinds_of_texts  # late: numba takes half a second
        return kinds_of_texts(self.octets, self.ends, kinds_of_characters())

    @cached_property
    def stripped(self) -> np.ndarray:
        """Where in `joined` each text begins and ends without surrounding whitespace, [texts, 2] int64."""
        from hrm_megatron.data.character_kernels import stripped_texts  # late, as above
        return stripped_texts(self.octets, self.ends, kinds_of_characters(), SPACE)

    @cached_property
    def not_nfc(self) -> np.ndarray:
        """Whether each text is not in NFC, [texts] bool."""
        found = np.zeros(len(self), bool)
        if not (self.kinds & UNSURE).any():
            return found
        from hrm_megatron.data.character_kernels import stretches_of_kind  # late, as above
        # A text is in NFC if every run of such characters, with the character before it, is.
        stretches = stretches_of_kind(self.octets, self.ends, kinds_of_characters(), self.kinds, UNSURE)
        in_nfc: dict[bytes, bool] = {}
        last = -1
        for text, start, end in zip(*stretches.T.tolist(), strict=True):  # no list per run: spares the collector
            if text == last:
                continue
            stretch = self.joined[start:end]
            if (known := in_nfc.get(stretch)) is None:
                known = in_nfc[stretch] = unicodedata.is_normalized("NFC", stretch.decode())
            if not known:
                found[text] = True
                last = text
        return found


@cache
def kinds_of_characters() -> np.ndarray:
    """Return the classes of every code point, [0x110000] uint8."""
    table = np.full(CODE_POINTS, UNASSIGNED | VISIBLE, np.uint8)
    seconds = set(HANGUL_SECOND)
    for code in range(PRIVATE_PLANES):
        character = chr(code)
        if unicodedata.category(character) in ("Cn", "Cs"):
            continue
        table[code] = VISIBLE
        if unicodedata.combining(character) or not unicodedata.is_normalized("NFC", character):
            table[code] |= UNSURE
        if character.isspace():
            table[code] |= SPACE
        if not unicodedata.is_normalized("NFD", character):
            table[code] |= PRECOMPOSED
            parts = unicodedata.decomposition(character).split()
            seconds.update(int(part, 16) for part in parts[1:])
    table[list(seconds)] |= UNSURE
    for match in INVISIBLE.finditer("".join(map(chr, range(1 << 16)))):
        table[match.start()] &= ~np.uint8(VISIBLE)
    table[ord(LOST_MARK)] |= LOST
    table[list(map(ord, CONTROLS))] |= CONTROL
    return table
