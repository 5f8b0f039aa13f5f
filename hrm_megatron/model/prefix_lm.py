"""Who may see whom in a packed row: whole prefixes both ways, responses causally, nothing across examples."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from hrm_megatron.model.rotary import Rotation
from hrm_megatron.parallel.context import Span, context_spans

Lengths = Sequence[Sequence[tuple[int, int]]]


class Piece(NamedTuple):
    """Queries of one example's prefix or of its responses, and the keys that they see, (start, length) each.

    Queries are counted in this rank's slice of the row, keys in the whole row. Prefixes see all of their keys;
    responses are `causal`: the last query sees all keys, the one before all but the last, and so on.
    """

    queries: tuple[int, int]
    keys: tuple[int, int]
    causal: bool


@dataclass
class PrefixSequences:
    """The examples of a micro-batch: `lengths[row]` lists (prefix, response) positions in order, padding last.

    Travels through Megatron's layers as `packed_seq_params`: they hand on any object there untouched, also
    through recomputation, as long as its `qkv_format` is not "thd" (transformer/attention.py). `rotation`
    turns queries and keys to their positions; it is made once per micro-batch and read at every tick. `spans`
    are the positions that this rank holds of rows of `row_tokens` (context parallelism; None: all).
    """

    lengths: Lengths
    rotation: Rotation
    row_tokens: int
    spans: Sequence[Span] | None = None
    qkv_format: str = "sbhd"
    _biases: dict[tuple[int, int, torch.dtype, torch.device], torch.Tensor] = field(default_factory=dict, repr=False)
    _pieces: dict[int, list[Piece]] = field(default_factory=dict, repr=False)

    def dense_mask(self, row: int) -> torch.Tensor:
        """Definition of the mask, [s, s] bool: True where the query (rows) may see the key (columns)."""
        allowed, start = torch.zeros(self.row_tokens, self.row_tokens, dtype=torch.bool), 0
        for p, r in self.lengths[row]:
            middle, end = start + p, start + p + r
            allowed[start:end, start:middle] = True
            allowed[middle:end, middle:end] = torch.ones(r, r, dtype=torch.bool).tril()
            start = end
        return allowed

    def pieces(self, row: int) -> list[Piece]:
        """Cut this rank's queries of a row into pieces, in their order; padding is in none."""
        if row not in self._pieces:
            self._pieces[row] = [
                Piece((span.local + first - span.start, last - first),
                      (start, last - start if causal else p), causal)
                for span in self.spans or context_spans(self.row_tokens)
                for start, p, r in _starts(self.lengths[row])
                for begin, end, causal in ((start, start + p, False), (start + p, start + p + r, True))
                if (first := max(begin, span.start)) < (last := min(end, span.start + span.length))]
        return self._pieces[row]

    def causal_bias(self, piece: Piece, like: torch.Tensor) -> torch.Tensor | None:
        """Additive mask [queries, keys] of a causal piece, made once and shared by all ticks and layers."""
        if not piece.causal:
            return None
        n, keys = piece.queries[1], piece.keys[1]
        key = (n, keys, like.dtype, like.device)
        if key not in self._biases:
            self._biases[key] = torch.full((n, keys), float("-inf"), dtype=like.dtype,
                                           device=like.device).triu(keys - n + 1)
        return self._biases[key]


def _starts(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Add to each (prefix, response) where the example starts."""
    starts, start = [], 0
    for p, r in pairs:
        starts.append((start, p, r))
        start += p + r
    return starts
