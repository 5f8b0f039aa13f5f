"""Rows of packed examples as tensors: shifted inputs, labels, and position ids that restart with each example."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from hrm_megatron.data.plan import row_length

IGNORED_LABEL = -100  # no loss at this position
PAD_TOKEN = 0
SOURCES = "sources"  # optional: source number of each example of a row, [row_tokens], zeros after the last

TokenIds = np.ndarray  # [n] integers


def assemble_row(examples: Sequence[tuple[TokenIds, TokenIds]], row_tokens: int,
                 causal: bool = False, loss_on_prefix: bool = False) -> dict[str, torch.Tensor]:
    """Lay (prefix, target) examples one after the other into a row of `row_tokens` positions, then pad.

    Returns int64 tensors [row_tokens]: `tokens`, `labels`, `position_ids`, and `prefix_lengths`, `response_lengths`
    (one entry per example, zeros after the last). The last prefix position predicts the first target token; an example
    with one target token has a response of length zero but still one label. A `causal` model gets an example as a
    prefix of one token and a long response. With `loss_on_prefix` prefix tokens are labels too, from the second on.
    Source: HRM-Text, dataset collation (`target_only`).
    """
    tokens = np.full(row_tokens, PAD_TOKEN, np.int64)
    labels = np.full(row_tokens, IGNORED_LABEL, np.int64)
    positions, prefixes, responses = (np.zeros(row_tokens, np.int64) for _ in range(3))
    start = 0
    for i, (prefix, target) in enumerate(examples):
        p, end = len(prefix), start + row_length(len(prefix), len(target))
        assert p and len(target) and end <= row_tokens, (p, len(target), end, row_tokens)
        tokens[start:start + p], tokens[start + p:end] = prefix, target[:-1]
        labels[start + p - 1:end] = target
        if loss_on_prefix:
            labels[start:start + p - 1] = prefix[1:]
        positions[start:end] = np.arange(end - start)
        prefixes[i] = 1 if causal else p
        responses[i] = end - start - prefixes[i]
        start = end
    arrays = dict(tokens=tokens, labels=labels, position_ids=positions, prefix_lengths=prefixes,
                  response_lengths=responses)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


@dataclass(frozen=True)
class PackedBatch:
    """A micro-batch of packed rows.

    `tokens`, `labels`, `position_ids` are [b, s]; `lengths[row]` lists the (prefix, response) positions of each example
    in order. `label_index` [n] points to the labelled positions in the flattened [s, b] order; `label_example` [n] is
    the example (0 to `num_examples` - 1) of each, and `example_source` [num_examples] the source of each example, if
    rows carry it. After `on_context_rank` the tensors are one rank's slice, [b, s/cp], with its labels; `lengths`,
    `row_tokens` and `example_source` still describe the whole rows.
    """

    tokens: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    lengths: tuple[tuple[tuple[int, int], ...], ...]
    label_index: torch.Tensor
    label_example: torch.Tensor
    row_tokens: int
    example_source: torch.Tensor | None = None

    @classmethod
    def from_row(cls, row: dict[str, torch.Tensor]) -> PackedBatch:
        """Build a micro-batch of one row, tensors [s]."""
        return cls.from_rows({name: tensor[None] for name, tensor in row.items()})

    @classmethod
    def from_rows(cls, rows: dict[str, torch.Tensor]) -> PackedBatch:
        """Build from stacked `assemble_row` results, [b, s] each; all indices are computed here, on the CPU."""
        b, s = rows["tokens"].shape
        lengths = tuple(
            tuple((p, r) for p, r in zip(prefixes, responses, strict=True) if p)
            for prefixes, responses in zip(rows["prefix_lengths"].tolist(), rows["response_lengths"].tolist(),
                                           strict=True))
        example = torch.zeros(b, s, dtype=torch.int64)
        count = 0
        for row, pairs in enumerate(lengths):
            sizes = torch.tensor([p + r for p, r in pairs], dtype=torch.int64)
            ids = torch.repeat_interleave(torch.arange(count, count + len(pairs)), sizes)
            example[row, :len(ids)] = ids
            count += len(pairs)
        index = _labelled(rows["labels"])
        sources = torch.cat([row[:len(pairs)] for row, pairs in zip(rows[SOURCES], lengths, strict=True)]) \
            if SOURCES in rows else None
        return cls(rows["tokens"], rows["labels"], rows["position_ids"], lengths, index,
                   example.t().reshape(-1)[index], s, sources)

    @property
    def num_examples(self) -> int:
        return sum(len(pairs) for pairs in self.lengths)

    @property
    def flat_labels(self) -> torch.Tensor:
        """Labels at `label_index`, [n]."""
        return self.labels.t().reshape(-1)[self.label_index]

    def in_order(self, orders: Sequence[Sequence[int]]) -> PackedBatch:
        """Reorder the examples of each row by `orders[row]`; padding stays last, examples keep their numbers."""
        rows = []
        for pairs, order in zip(self.lengths, orders, strict=True):
            sizes = [p + r for p, r in pairs]
            *examples, padding = torch.arange(self.row_tokens).split([*sizes, self.row_tokens - sum(sizes)])
            rows.append(torch.cat([*(examples[i] for i in order), padding]))
        lengths = tuple(tuple(pairs[i] for i in order) for pairs, order in zip(self.lengths, orders, strict=True))
        return replace(self._taken(torch.stack(rows)), lengths=lengths)

    def on_context_rank(self, positions: torch.Tensor) -> PackedBatch:
        """Keep only these positions [s/cp] of every row."""
        return self._taken(positions.expand(len(self.labels), -1))

    def _taken(self, places: torch.Tensor) -> PackedBatch:
        """Gather the positions `places[row]` of each row, [b, n]."""
        b, s = self.labels.shape
        example = torch.zeros(s * b, dtype=torch.int64)
        example[self.label_index] = self.label_example
        labels = self.labels.gather(1, places)
        index = _labelled(labels)
        return replace(self, tokens=self.tokens.gather(1, places), labels=labels,
                       position_ids=self.position_ids.gather(1, places), label_index=index,
                       label_example=example.view(s, b).gather(0, places.t()).reshape(-1)[index])

    def to(self, device: torch.device | str) -> PackedBatch:
        """Move the tensors; the lengths stay Python numbers."""
        moved: dict[str, Any] = {name: send(tensor, torch.device(device)) for name in (
            "tokens", "labels", "position_ids", "label_index", "label_example", "example_source")
            if (tensor := getattr(self, name)) is not None}
        return replace(self, **moved)


def send(t: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a CPU tensor to `device` without blocking the host: the copy must come from pinned memory for that."""
    if device.type == "cuda" and torch.cuda.is_available():
        t = t.pin_memory()
    return t.to(device, non_blocking=True)


def _labelled(labels: torch.Tensor) -> torch.Tensor:
    """Return the indices [n] of labelled positions in the flattened [s, b] order of labels [b, s]."""
    return (labels.t().reshape(-1) != IGNORED_LABEL).nonzero().squeeze(1)
