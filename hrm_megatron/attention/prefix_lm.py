"""Who may see whom in a packed row: whole prefixes both ways, responses causally, nothing across examples."""
from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from hrm_megatron.attention.rotary import Rotation
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
    _made: dict[tuple[Any, ...], Any] = field(default_factory=dict, repr=False)

    def once[T](self, make: Callable[..., T], *values: Hashable) -> T:
        """Return `make(self, *values)`, made once and shared by all ticks and layers."""
        if (make, *values) not in self._made:
            self._made[make, *values] = make(self, *values)
        made: T = self._made[make, *values]
        return made

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
        return self.once(_pieces, row)

    def causal_bias(self, piece: Piece, like: torch.Tensor) -> torch.Tensor | None:
        """Additive mask [queries, keys] of a causal piece, in the dtype and on the device of `like`."""
        return self.once(_bias, piece.queries[1], piece.keys[1], like.dtype, like.device) if piece.causal else None


def _pieces(sequences: PrefixSequences, row: int) -> list[Piece]:
    return cut(sequences.lengths[row], sequences.spans or context_spans(sequences.row_tokens))


def context_loads(lengths: Lengths, row_tokens: int, ranks: int) -> list[int]:
    """Count the (query, key) pairs of each context parallel rank over these rows."""
    def pairs(piece: Piece) -> int:
        queries, keys = piece.queries[1], piece.keys[1]
        return queries * keys - piece.causal * queries * (queries - 1) // 2
    return [sum(pairs(piece) for row in lengths for piece in cut(row, context_spans(row_tokens, rank, ranks)))
            for rank in range(ranks)]


def cut(examples: Sequence[tuple[int, int]], spans: Sequence[Span]) -> list[Piece]:
    """Cut the examples of a row, (prefix, response) each, into the pieces of which `spans` hold queries."""
    return [Piece((span.local + first - span.start, last - first), (start, last - start if causal else p), causal)
            for span in spans for start, p, r in _starts(examples)
            for begin, end, causal in ((start, start + p, False), (start + p, start + p + r, True))
            if (first := max(begin, span.start)) < (last := min(end, span.start + span.length))]


def _bias(_: PrefixSequences, queries: int, keys: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.full((queries, keys), float("-inf"), dtype=dtype, device=device).triu(keys - queries + 1)


def _starts(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Add to each (prefix, response) where the example starts."""
    starts, start = [], 0
    for p, r in pairs:
        starts.append((start, p, r))
        start += p + r
    return starts
