"""PrefixLM attention as two variable-length calls over all rows of a micro-batch.

The first call has the queries of prefixes and no mask; the second those of responses, whose keys are the whole example,
with a bottom-right causal mask. The arguments of the calls are computed on the host from the lengths, copied to the
device once and used by all ticks and layers: no device-to-host synchronization.
"""
from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.nn.attention.varlen import varlen_attn

from hrm_megatron.attention.gather_scatter import GatherForCalls, RowIndex, ScatterFromCalls
from hrm_megatron.attention.prefix_lm import Piece, PrefixSequences
from hrm_megatron.data.batch import send
from hrm_megatron.layers.functions import run


@dataclass(frozen=True)
class VarlenCall:
    """Concatenated sequences of queries, and for each the sequence of its keys.

    `queries` [tq] and `keys` [tk] index the flattened positions, [s/cp * b] and [s * b]; sequence i spans
    `cu_queries[i]` to `cu_queries[i + 1]` of `queries` and `cu_keys[i]` to `cu_keys[i + 1]` of `keys` (int32, [n + 1]).
    `max_queries` and `max_keys` bound the lengths. With `causal` the last query of a sequence attends to all keys, the
    one before to all but the last, and so on.
    """

    queries: RowIndex
    keys: RowIndex
    cu_queries: torch.Tensor
    cu_keys: torch.Tensor
    max_queries: int
    max_keys: int
    causal: bool


# q [tq, heads, d], k and v [tk, heads, d], call, softmax scale (None: 1 / sqrt(d)) > [tq, heads, d]
Primitive = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, VarlenCall, float | None], torch.Tensor]


def varlen_calls(sequences: PrefixSequences, device: torch.device, bucketed: bool = False) -> list[VarlenCall]:
    """Return the calls of a micro-batch, at most two: a call without queries is left out.

    `bucketed` rounds the bounds and the number of sequences (by empty ones at the end) up to a power of two.
    """
    pieces = [(row, piece) for row in range(len(sequences.lengths)) for piece in sequences.pieces(row)]
    chosen = {causal: [one for one in pieces if one[1].causal == causal] for causal in (False, True)}
    return [_call(part, causal, len(sequences.lengths), device, bucketed) for causal, part in chosen.items() if part]


def _call(pieces: list[tuple[int, Piece]], causal: bool, rows: int, device: torch.device, bucketed: bool) -> VarlenCall:
    (queries, cu_queries), (keys, cu_keys) = (
        _row_index([(row, *getattr(piece, what)) for row, piece in pieces], rows) for what in ("queries", "keys"))
    max_queries, max_keys = (max(getattr(piece, what)[1] for _, piece in pieces) for what in ("queries", "keys"))
    if bucketed:
        max_queries, max_keys = bucket(max_queries), bucket(max_keys)
        empty = bucket(len(pieces)) - len(pieces)
        cu_queries, cu_keys = (torch.cat((cu, cu[-1:].expand(empty))) for cu in (cu_queries, cu_keys))
    return VarlenCall(RowIndex.of(queries, device), RowIndex.of(keys, device, _keys_again(pieces)),
                      send(cu_queries.int(), device), send(cu_keys.int(), device), max_queries, max_keys, causal)


def _keys_again(pieces: list[tuple[int, Piece]]) -> torch.Tensor | None:
    """Return True for each key [tk] that appears a second time, or None: both slices of a context rank can cut one
    example."""
    seen: set[tuple[int, int]] = set()
    again = []
    for row, piece in pieces:
        again.append((row, piece.keys[0]) in seen)
        seen.add((row, piece.keys[0]))
    if not any(again):
        return None
    return torch.tensor(again).repeat_interleave(torch.tensor([piece.keys[1] for _, piece in pieces]))


def _row_index(runs: Sequence[tuple[int, int, int]], rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the flat index [t] of runs (row, start, length) in [s, b = rows], and the offset at which each begins [n +
    1]."""
    row, start, length = torch.tensor(runs).unbind(1)
    ends = length.cumsum(0)
    within = torch.arange(int(ends[-1])) - (ends - length).repeat_interleave(length)
    return (start.repeat_interleave(length) + within) * rows + row.repeat_interleave(length), torch.cat(
        (ends.new_zeros(1), ends))


def bucket(n: int) -> int:
    """Return n rounded up to a power of two, at least 16."""
    return max(16, 1 << (n - 1).bit_length())


def attend_in_calls(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, calls: Sequence[VarlenCall],
                    primitive: Primitive, scale: float | None) -> torch.Tensor:
    """Attend from q [s/cp, b, heads, d] to k, v [s, b, heads, d]: [s/cp, b, heads * d], zeros at padding."""
    flat_q, flat_k, flat_v = (t.flatten(0, 1) for t in (q, k, v))
    if calls:
        parts = run(GatherForCalls, flat_q, flat_k, flat_v,
                    [(call.queries, call.keys, call.keys) for call in calls])
        results = [primitive(queries, keys, values, call, scale)
                   for (queries, keys, values), call in zip(itertools.batched(parts, 3), calls, strict=True)]
        out = run(ScatterFromCalls, [call.queries for call in calls], len(flat_q), *results)
    else:
        out = torch.cat((torch.zeros_like(flat_q), nothing_of(flat_q, flat_k, flat_v)))
    return out.view(*q.shape[:2], -1)


def nothing_of(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return an empty [0, heads, d] tensor whose graph includes all three.

    A context rank that holds only padding must still take part in the backward of the gather of keys.
    """
    return q[:0] + k[:0] + v[:0]


def plain_varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: VarlenCall,
                 scale: float | None) -> torch.Tensor:
    """Reference primitive: one sequence after the other, in the dtype of its inputs."""
    outputs = []
    bounds = (itertools.pairwise(cu.tolist()) for cu in (call.cu_queries, call.cu_keys))
    for (first, last), (begin, end) in zip(*bounds, strict=True):
        scores = torch.einsum("ihd,jhd->hij", q[first:last], k[begin:end]) * (scale or q.shape[-1] ** -0.5)
        if call.causal:
            hidden = torch.ones(scores.shape[1:], dtype=torch.bool).triu(scores.shape[2] - scores.shape[1] + 1)
            scores = scores.masked_fill(hidden.to(q.device), float("-inf"))
        outputs.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v[begin:end]))
    return torch.cat(outputs)


def torch_varlen(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: VarlenCall,
                 scale: float | None) -> torch.Tensor:
    """Primitive of torch's FlashAttention 2, whose causal mask is bottom-right aligned in each sequence."""
    out = varlen_attn(
        q, k, v, call.cu_queries, call.cu_keys, call.max_queries, call.max_keys, scale=scale,
        window_size=(-1, 0) if call.causal else (-1, -1))  # causal, as torch 2.11 spells it
    assert isinstance(out, torch.Tensor)  # not a pair: no auxiliary output was requested
    return out
