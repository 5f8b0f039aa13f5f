"""Packed rows as a torch dataset: what a training step reads, the same for any number of readers."""
from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from hrm_megatron.config import ConfigError
from hrm_megatron.data.batch import assemble_row
from hrm_megatron.data.indexed_examples import IndexedExamples
from hrm_megatron.data.plan import RowPlan, check_lengths, random_order
from hrm_megatron.data.sampled import SampledFolder
from hrm_megatron.data.vocabulary import check_examples

SPLIT_STREAM = 969_301  # keeps the split's permutation apart from those of the epochs

Ids = np.ndarray  # [n] example ids


class Split(NamedTuple):
    """Example ids of each part, ascending; no id is in two parts."""

    train: Ids
    valid: Ids
    test: Ids


def split_sizes(count: int, split: str) -> list[int]:
    """Count the examples of each part of `count` in the proportions of `split`.

    A part with a positive weight gets at least one example while training has more than one to give.
    """
    try:
        weights = [float(weight) for weight in split.split(",")]
    except ValueError:
        weights = []
    if not 1 <= len(weights) <= 3 or not np.isfinite(weights).all() or min(weights) < 0 or sum(weights) <= 0:
        raise ConfigError(f"split={split!r}: give up to three weights for train, valid, test, for example 97,3,0")
    weights += [0.0] * (3 - len(weights))
    sizes = [int(count * weight / sum(weights)) for weight in weights]
    largest = int(np.argmax(weights))
    sizes[largest] += count - sum(sizes)
    for part, weight in enumerate(weights):
        if weight and not sizes[part] and sizes[largest] > 1:
            sizes[part], sizes[largest] = 1, sizes[largest] - 1
    return sizes


def split_examples(count: int, split: str, seed: int) -> Split:
    """Divide `count` examples into parts of `split_sizes`, by a permutation of the seed."""
    order = random_order(count, seed, SPLIT_STREAM)
    return Split(*(np.sort(part) for part in np.split(order, np.cumsum(split_sizes(count, split))[:2])))


class PackedRows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """`num_rows` rows of `row_tokens` positions; row i holds the same examples in every process.

    `example_ids` selects examples of an indexed dataset (one part of its split). Training walks on from epoch to epoch;
    `fixed=True`, for validation and test, repeats the rows of epoch 0, or these and empty ones up to `period`. A
    sampled folder keeps its own order. From `split` Megatron reads whether batches are those of an evaluation.
    """

    split: Any = None

    def __init__(self, source: IndexedExamples | SampledFolder, row_tokens: int, seed: int, num_rows: int,
                 example_ids: Ids | None = None, fixed: bool = False, cache_folder: str | Path | None = None) -> None:
        assert example_ids is None or isinstance(source, IndexedExamples)
        self.source = source
        self.row_tokens = row_tokens
        self.num_rows = num_rows
        self.fixed = fixed
        self.example_ids = example_ids
        # A too long example of a late epoch must not end a run after days.
        for epoch in range(source.epochs if isinstance(source, SampledFolder) else 1):
            check_lengths(self._source_lengths(epoch), row_tokens)
        self.plan = RowPlan(self._row_lengths, row_tokens, seed, shuffle=isinstance(source, IndexedExamples),
                            cache_folder=cache_folder)
        self.rows_per_epoch = self.period = len(self.plan.rows_of_epoch(0))

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        """Return `assemble_row` of the examples in row `row`."""
        if not 0 <= row < self.num_rows:
            raise IndexError(f"row {row} of {self.num_rows}")
        row = int(row) % self.period if self.fixed else int(row)
        if self.fixed and row >= self.rows_per_epoch:
            return assemble_row([], self.row_tokens)
        epoch, ids = self.plan.locate(row)
        examples = [self._example(epoch, int(i)) for i in ids]
        check_examples(examples, self.source.vocab_size, lambda i: self._name(epoch, int(ids[i])))
        return assemble_row(examples, self.row_tokens)

    def describe(self) -> str:
        """Say how many examples there are and how well they fill rows, in epoch 0."""
        lengths = self._row_lengths(0)
        fill = lengths.sum() / (self.rows_per_epoch * self.row_tokens)
        return (f"{len(lengths)} examples, {self.rows_per_epoch} rows of {self.row_tokens} tokens per epoch, "
                f"{fill:.1%} filled")

    def _source_lengths(self, epoch: int) -> np.ndarray:
        source = self.source
        prefixes, targets = source.lengths() if isinstance(source, IndexedExamples) else source.epoch_lengths(epoch)
        return np.asarray(prefixes + targets - 1)  # row_length

    def _row_lengths(self, epoch: int) -> np.ndarray:
        lengths = self._source_lengths(epoch)
        return lengths if self.example_ids is None else lengths[self.example_ids]

    def _example(self, epoch: int, i: int) -> tuple[np.ndarray, np.ndarray]:
        if isinstance(self.source, SampledFolder):
            return self.source.example(epoch, i)
        return self.source[self._stored(i)]

    def _name(self, epoch: int, i: int) -> str:
        if isinstance(self.source, SampledFolder):
            return self.source.example_name(epoch, i)
        return self.source.example_name(self._stored(i))

    def _stored(self, i: int) -> int:
        """Number of an example in the indexed dataset."""
        return i if self.example_ids is None else int(self.example_ids[i])
