"""Detect token ids outside the vocabulary: on a GPU they would fail an assertion in mid-run, or train rows of the
embedding that are only padding."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from hrm_megatron.config import ConfigError

SCANNED_BYTES = 1 << 28  # of ids are scanned on opening, in a fraction of a second; larger data is checked row by row
BLOCK_TOKENS = 1 << 22
PARTS = ("prefix", "target")

Ids = np.ndarray  # [n] token ids


class BadTokenId(ConfigError):
    """A token id outside the vocabulary."""

    def __init__(self, message: str) -> None:
        # A DataLoader recreates it in the main process from the worker's traceback, whose last line is our message.
        super().__init__(message.rstrip().rpartition(f"{type(self).__name__}: ")[2])

    @classmethod
    def at(cls, example: str, part: int, position: int, token: int, vocab_size: int) -> BadTokenId:
        return cls(f"{example}: token {position} of its {PARTS[part]} has the id {token}, but the vocabulary has "
                   f"{vocab_size} entries; write the data again with the tokenizer that it is trained with")


def positions_outside(ids: Ids, vocab_size: int) -> Iterator[np.ndarray]:
    """Yield the positions of `ids` outside the vocabulary, ascending, an array per block that has some."""
    kinds = np.iinfo(ids.dtype)
    if 0 <= kinds.min and kinds.max < vocab_size:
        return  # the dtype cannot hold such an id
    for start in range(0, len(ids), BLOCK_TOKENS):
        block = ids[start:start + BLOCK_TOKENS]
        if block.max() >= vocab_size or block.min() < 0:
            yield start + np.flatnonzero((block >= vocab_size) | (block < 0))


def check_examples(examples: Sequence[tuple[Ids, Ids]], vocab_size: int, name: Callable[[int], str]) -> None:
    """Raise BadTokenId at the first id outside the vocabulary; `name(i)` names the i-th example."""
    if not any(True for _ in positions_outside(np.concatenate([ids for pair in examples for ids in pair]), vocab_size)):
        return
    for i, pair in enumerate(examples):
        for part, ids in enumerate(pair):
            for at in positions_outside(ids, vocab_size):
                raise BadTokenId.at(name(i), part, int(at[0]), int(ids[at[0]]), vocab_size)
