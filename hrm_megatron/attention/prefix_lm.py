"""The attention mask of a packed row: bidirectional within prefixes, causal in responses, nothing across examples."""
from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from hrm_megatron.attention.rotary import Rotation
from hrm_megatron.parallel.context import Span, context_spans

Lengths = Sequence[Sequence[tuple[int, int]]]


class Piece(NamedTuple):
    """Queries of one example's prefix or response, and the keys they attend to, each as (start, length).

    Queries are indexed in this rank's slice of the row, keys in the whole row. Prefix queries attend to all keys of
    their piece; response queries are `causal`: the last one attends to all keys, the one before to all but the last,
    and so on.
    """

    queries: tuple[int, int]
    keys: tuple[int, int]
    causal: bool


@dataclass
class PrefixSequences:
    """The examples of a micro-batch: `lengths[row]` lists (prefix, response) positions in order, padding last.

    Passed through Megatron's layers as `packed_seq_params`: they pass on any object unchanged, also through recompute,
    unless its `qkv_format` is "thd" (transformer/attention.py). `rotation` is the rotary embedding of queries and keys,
    computed once per micro-batch and used at every tick. `spans` are the positions of each row of `row_tokens` that
    this rank holds (context parallelism; None: all).
    """

    lengths: Lengths
    rotation: Rotation
    row_tokens: int
    spans: Sequence[Span] | None = None
    qkv_format: str = "sbhd"
    _made: dict[tuple[Any, ...], Any] = field(default_factory=dict, repr=False)

    def once[T](self, make: Callable[..., T], *values: Hashable) -> T:
        """Return `make(self, *values)`, cached for all ticks and layers."""
        if (make, *values) not in self._made:
            self._made[make, *values] = make(self, *values)
        made: T = self._made[make, *values]
        return made

    def dense_mask(self, row: int) -> torch.Tensor:
        """Return the reference mask, [s, s] bool: True where the query (row) may attend to the key (column)."""
        allowed, start = torch.zeros(self.row_tokens, self.row_tokens, dtype=torch.bool), 0
        for p, r in self.lengths[row]:
            middle, end = start + p, start + p + r
            allowed[start:end, start:middle] = True
            allowed[middle:end, middle:end] = torch.ones(r, r, dtype=torch.bool).tril()
            start = end
        return allowed

    def pieces(self, row: int) -> list[Piece]:
        """Return this rank's queries of a row as pieces, in order; padding is in none."""
        return self.once(_pieces, row)

    def causal_bias(self, piece: Piece, like: torch.Tensor) -> torch.Tensor | None:
        """Return the additive mask [queries, keys] of a causal piece, in the dtype and on the device of `like`; else
        None."""
        return self.once(_bias, piece.queries[1], piece.keys[1], like.dtype, like.device) if piece.causal else None


def _pieces(sequences: PrefixSequences, row: int) -> list[Piece]:
    return cut(sequences.lengths[row], sequences.spans or context_spans(sequences.row_tokens))


def context_loads(lengths: Lengths, row_tokens: int, ranks: int) -> list[int]:
    """Return the number of (query, key) pairs of each context parallel rank over these rows."""
    def pairs(piece: Piece) -> int:
        queries, keys = piece.queries[1], piece.keys[1]
        return queries * keys - piece.causal * queries * (queries - 1) // 2
    return [sum(pairs(piece) for row in lengths for piece in cut(row, context_spans(row_tokens, rank, ranks)))
            for rank in range(ranks)]


def cut(examples: Sequence[tuple[int, int]], spans: Sequence[Span]) -> list[Piece]:
    """Return the pieces of a row's (prefix, response) examples that have queries in `spans`."""
    return [Piece((span.local + first - span.start, last - first), (start, last - start if causal else p), causal)
            for span in spans for start, p, r in _starts(examples)
            for begin, end, causal in ((start, start + p, False), (start + p, start + p + r, True))
            if (first := max(begin, span.start)) < (last := min(end, span.start + span.length))]


def _bias(_: PrefixSequences, queries: int, keys: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.full((queries, keys), float("-inf"), dtype=dtype, device=device).triu(keys - queries + 1)


def _starts(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Return (start, prefix, response) of each example."""
    starts, start = [], 0
    for p, r in pairs:
        starts.append((start, p, r))
        start += p + r
    return starts
