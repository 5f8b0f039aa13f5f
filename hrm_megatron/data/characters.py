"""Texts of a batch, and what their characters are, looked up for all of them together.

The texts stay in the UTF-8 that they are read as, hashed as and spelled from; a string is made where one is asked for.
A look into a table per character replaces the search for normal forms, for unassigned code points, for texts that show
nothing, for white space and for marks of lost characters.
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
HANGUL_SECOND = (*range(0x1161, 0x1176), *range(0x11A8, 0x11C3))  # vowels and finals, composed by arithmetic
# What a character may be.
UNASSIGNED = 1  # not in this Python's Unicode, or of a private plane
UNSURE = 2  # a text without such a one is in NFC: it changes, moves or joins the one before (UAX 15, quick check)
PRECOMPOSED = 4  # NFD makes others of it
VISIBLE = 8
LOST = 16
CONTROL = 32  # that JSON can make of a backslash and a letter
SPACE = 64  # to str.strip
CONTROLS = "\b\t\n\f\r"


class Texts(Sequence[str]):
    """Texts of a batch."""

    def __init__(self, joined: bytes, ends: np.ndarray) -> None:
        """Take the UTF-8 of the texts, a NUL behind each, and where in it the next one begins, [texts] int64."""
        self.joined = joined
        self.ends = ends

    @classmethod
    def of(cls, texts: Iterable[str]) -> Texts:
        """Return them as they are if they are of a batch already. Raises UnicodeEncodeError at half a surrogate
        pair."""
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
        """The numbers of `joined`, [bytes] uint8."""
        return np.frombuffer(self.joined, np.uint8)

    @cached_property
    def kinds(self) -> np.ndarray:
        """What is among the characters of each text, [texts] uint8."""
        if not self:
            return np.empty(0, np.uint8)
        from hrm_megatron.data.character_kernels import kinds_of_texts  # late: numba takes half a second
        return kinds_of_texts(self.octets, self.ends, kinds_of_characters())

    @cached_property
    def stripped(self) -> np.ndarray:
        """Where in `joined` each text begins and ends without the white space around it, [texts, 2] int64."""
        from hrm_megatron.data.character_kernels import stripped_texts  # late, as above
        return stripped_texts(self.octets, self.ends, kinds_of_characters(), SPACE)

    @cached_property
    def not_nfc(self) -> np.ndarray:
        """Say of each text whether it is in another form than NFC, [texts] bool."""
        found = np.zeros(len(self), bool)
        if not (self.kinds & UNSURE).any():
            return found
        from hrm_megatron.data.character_kernels import stretches_of_kind  # late, as above
        # A text is in NFC if every stretch of such characters is, with the one that they follow: none reaches further.
        stretches = stretches_of_kind(self.octets, self.ends, kinds_of_characters(), self.kinds, UNSURE)
        in_nfc: dict[bytes, bool] = {}
        last = -1
        for text, start, end in zip(*stretches.T.tolist(), strict=True):  # no list for each, which wakes the collector
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
    """Say of every code point what it is, [0x110000] uint8."""
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
