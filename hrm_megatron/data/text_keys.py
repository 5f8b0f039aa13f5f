"""Hash keys that identify equal texts without storing them: for the split by prompt, and for deduplication."""
from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from unicodedata import normalize

import numpy as np

from hrm_megatron.data.example_batch import ExampleBatch
from hrm_megatron.data.shards import KEY

_LENGTHS = struct.Struct("<3Q")


class TextKeys:
    """Keys of examples, in the order in which they are added."""

    def __init__(self) -> None:
        self._prompts: list[bytes] = []
        self._examples: list[bytes] = []

    def add(self, batch: ExampleBatch, chosen: Iterable[int]) -> None:
        """Add the examples of a batch with these indices."""
        conditions, texts, questions = batch.conditions, batch.texts, batch.questions
        heads = {condition: condition.encode() for condition in set(conditions)}
        starts, ends = texts.stripped.T
        # Without a prompt, as at the beginning of a plain document, the response is the key.
        prompts = np.arange(0, len(texts), 2) + (starts == ends)[::2]
        whole = np.diff(texts.ends, prepend=0) - 1 == ends - starts
        plain = (whole & ~texts.not_nfc)[prompts].tolist()
        utf8, prompt_of = texts.utf8, prompts.tolist()
        for i in chosen:
            prompt = prompt_of[i]
            self._prompts.append(prompt_key(questions[i]) if i in questions else
                                 _prompt_key(utf8[prompt]) if plain[i] else prompt_key(texts[prompt]))
            self._examples.append(example_key(heads[conditions[i]], utf8[2 * i], utf8[2 * i + 1]))

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the prompt keys [n] and the example keys [n, 2]."""
        return (np.frombuffer(b"".join(self._prompts), KEY),
                np.frombuffer(b"".join(self._examples), KEY).reshape(-1, 2))


def prompt_key(instruction: str) -> bytes:
    """Return 8 bytes that are equal for texts that differ only in surrounding whitespace or Unicode normalization: the
    first bytes of BLAKE2b of the stripped NFC text."""
    return _prompt_key(normalize("NFC", instruction.strip()).encode())


def _prompt_key(utf8: bytes) -> bytes:
    return hashlib.blake2b(utf8).digest()[:KEY.itemsize]


def example_key(condition: bytes, instruction: bytes, response: bytes) -> bytes:
    """Return 16 bytes that are equal only if all texts of two examples, in UTF-8, are."""
    # lengths distinguish ("ab", "c") from ("a", "bc")
    lengths = _LENGTHS.pack(len(condition), len(instruction), len(response))
    return hashlib.blake2b(b"".join((lengths[:8], condition, lengths[8:16], instruction, lengths[16:], response)),
                           digest_size=2 * KEY.itemsize).digest()
