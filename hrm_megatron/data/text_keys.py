"""Keys by which equal texts are found without the texts: for a split by prefix, and for deduplication."""
from __future__ import annotations

import hashlib
from unicodedata import normalize

import numpy as np

from hrm_megatron.data.example import Example
from hrm_megatron.data.shards import KEY


class TextKeys:
    """The keys of examples, in the order in which they are added."""

    def __init__(self) -> None:
        self._prompts: list[bytes] = []
        self._examples: list[bytes] = []

    def add(self, example: Example) -> None:
        # Without a prompt, as at the beginning of a plain document, nothing else tells examples apart.
        self._prompts.append(prompt_key(example.instruction.strip() or example.response))
        self._examples.append(example_key(example))

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Return a key [n] of each instruction and two [n, 2] of each example."""
        return (np.frombuffer(b"".join(self._prompts), KEY),
                np.frombuffer(b"".join(self._examples), KEY).reshape(-1, 2))


def prompt_key(instruction: str) -> bytes:
    """Return 8 bytes that are the same for texts which differ in white space around them or in normalization: the
    first of BLAKE2b of the NFC text."""
    return hashlib.blake2b(normalize("NFC", instruction.strip()).encode()).digest()[:KEY.itemsize]


def example_key(example: Example) -> bytes:
    """Return 16 bytes that are the same only where all texts of the example are."""
    hashed = hashlib.blake2b(digest_size=2 * KEY.itemsize)
    for text in (example.condition, example.instruction, example.response):
        data = text.encode()
        hashed.update(len(data).to_bytes(8, "little"))  # ("ab", "c") is not ("a", "bc")
        hashed.update(data)
    return hashed.digest()
