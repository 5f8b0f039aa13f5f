"""Encode examples to stored ids: truncated to the context, and left out if the prefix alone fills it."""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hrm_megatron.data.characters import Texts
from hrm_megatron.data.tokenizer import TextTokenizer


class Spelled(NamedTuple):
    """Ids of the examples that fit: prefix, target, prefix, target, ..."""

    ids: np.ndarray  # [sum of lengths] int32
    lengths: np.ndarray  # [examples that fit, 2] int64
    kept: list[int]  # indices of the examples that fit
    too_long: list[tuple[int, int]]  # (index of an example that does not fit, prefix length)
    truncated: list[int]  # indices of examples whose target was cut and thus lacks its end token

    def holding(self, token: int) -> np.ndarray:
        """Return for each text of all examples, bool [2 x examples], whether `token` is in its stored ids."""
        found = np.zeros(2 * (len(self.kept) + len(self.too_long)), bool)
        at = np.searchsorted(self.lengths.reshape(-1).cumsum(), np.flatnonzero(self.ids == token), "right")
        found[2 * np.array(self.kept, np.int64)[at // 2] + at % 2] = True
        return found


def spell(tokenizer: TextTokenizer, conditions: Sequence[str], texts: Texts, context_size: int) -> Spelled:
    """Encode examples (texts: instruction, response, instruction, ...), each in at most `context_size` positions."""
    ids, flat = tokenizer.encode_examples(conditions, texts)
    lengths = flat.reshape(-1, 2)
    room = context_size + 1 - lengths[:, 0]  # the last target token takes no position
    fits = room >= 1
    cut = fits & (lengths[:, 1] > room)
    if cut.any() or not fits.all():
        kept = np.where(fits[:, None], np.column_stack([lengths[:, 0], np.minimum(lengths[:, 1], room)]), 0)
        position = np.arange(len(ids)) - np.repeat(flat.cumsum() - flat, flat)
        ids = ids[position < np.repeat(kept.reshape(-1), flat)]
    else:
        kept = lengths
    too_long = [(i, int(lengths[i, 0])) for i in np.flatnonzero(~fits).tolist()]
    return Spelled(ids, kept[fits], np.flatnonzero(fits).tolist(), too_long, np.flatnonzero(cut).tolist())
