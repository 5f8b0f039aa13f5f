"""Texts on which two tokenizers are most likely to differ, and a tokenizer whose ids show every border of a piece."""
from __future__ import annotations

import itertools
import json
import random
import unicodedata
from collections.abc import Iterator

from tokenizers import Tokenizer, pre_tokenizers

from hrm_megatron.data.spelling import SPECIAL_TOKENS

# One character or more of each class that the expression tells apart, and those that matter to NFC.
CLASSES = ("a", "s", "1", " ", "\t", "\n", "\r", "!", "'", "\u00e9", "\u0301", "\u00a0", "\u0085", "\u2028", "\u017f",
           "\u2167", "\u200d", "\x00", "\U0001f600")
NEIGHBOURS = " a1!'\nst\r\t"
# Classes do not change within these: one code point in 64 is tried.
UNIFORM = ((0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xE000, 0xF8FF), (0x17000, 0x187F7),
           (0x20000, 0x2A6DF), (0x2A700, 0x323AF))


def scripts() -> dict[str, list[str]]:
    """Assigned characters by the first word of their names, which is the script of a letter."""
    found: dict[str, list[str]] = {}
    for code in range(0x80, 0x32000):
        name = unicodedata.name(chr(code), "")
        if name:
            found.setdefault(name.split()[0], []).append(chr(code))
    return found


def documents(count: int, seed: int) -> Iterator[str]:
    """Yield texts of all scripts, mixed with marks, spaces, special tokens, later code points, other forms."""
    rng = random.Random(seed)
    by_script = scripts()
    names = sorted(by_script)
    marks = [chr(code) for code in range(0x300, 0x370)] + ["\u0591", "\u05bc", "\u064b", "\u0651", "\u093c", "\u09be",
                                                           "\u1161", "\u11a8", "\u3099", "\u0f71", "\U00011930"]
    odd = [*CLASSES, "\u200c", "\ufe0f", "\u2011", "\ufeff", "\ufffd", "\x08", "\x0c", "\x1b", "\x7f", "\u088f",
           "\U00010940", "\U0010ffff", "\ue000", "\uffff", "''", "'s", "'LL", "  ", "\n\n", "\r\n", *SPECIAL_TOKENS]
    for i in range(count):
        script = by_script[names[i % len(names)]]
        parts = []
        for _ in range(rng.randint(1, 30)):
            kind = rng.random()
            if kind < 0.55:
                word = "".join(rng.choices(script, k=rng.randint(1, 8)))
                parts.append(word if rng.random() < 0.9 else word + rng.choice(marks))
            elif kind < 0.75:
                parts.append(rng.choice(odd))
            else:
                long = "x" * rng.randint(1, 60)
                parts.append(rng.choice(("the", "Don't", "2024", " ", ", ", "\n", "= {", "()", long)))
            parts.append(rng.choice(("", " ", " ")))
        text = "".join(parts)
        form = rng.random()
        yield unicodedata.normalize("NFD" if form < 0.1 else "NFC", text) if form < 0.6 else text


def class_strings(longest: int) -> Iterator[str]:
    """Yield all strings of at most so many of CLASSES."""
    for length in range(1, longest + 1):
        yield from map("".join, itertools.product(CLASSES, repeat=length))


def code_points() -> Iterator[str]:
    """Yield every code point that can behave differently from its neighbours."""
    for code in range(0x110000):
        inside = next((a for a, b in UNIFORM if a < code < b), None)
        if not 0xD800 <= code < 0xE000 and (inside is None or (code - inside) % 64 == 0) and \
                unicodedata.category(chr(code)) != "Cn":
            yield chr(code)


def bordered(tokenizer: Tokenizer) -> str:
    """A tokenizer.json like this one with another vocabulary: bytes of neighbouring characters merge unless the
    expression cuts between them, so that ids show its borders."""
    alphabet = _byte_characters()
    vocabulary = {alphabet[byte]: byte for byte in range(256)}
    merges = []

    def merge(left: int, right: int) -> None:
        pair = alphabet[left] + alphabet[right]
        if pair not in vocabulary:
            vocabulary[pair] = len(vocabulary)
            merges.append([alphabet[left], alphabet[right]])

    first, last = range(0xC2, 0xF5), range(0x80, 0xC0)
    ascii_bytes = [ord(c) for c in NEIGHBOURS]
    for left, right in itertools.chain(itertools.product(ascii_bytes, first), itertools.product(last, ascii_bytes),
                                       itertools.product(last, first), itertools.product(ascii_bytes, repeat=2)):
        merge(left, right)
    config = json.loads(tokenizer.to_str())
    config["model"].update(vocab=vocabulary, merges=merges)
    config.update(added_tokens=[], post_processor=None)
    return json.dumps(config)


def _byte_characters() -> list[str]:
    """The character by which ByteLevel spells each byte: those that print stand for themselves."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    table = {byte: chr(byte) for byte in printed} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    assert set(table.values()) == set(pre_tokenizers.ByteLevel.alphabet())
    return [table[byte] for byte in range(256)]
