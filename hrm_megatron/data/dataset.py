"""Packed rows as a torch dataset: what a training step reads, identical for any number of loader workers."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hrm_megatron.data.batch import SOURCES, assemble_row
from hrm_megatron.data.indexed_examples import IndexedExamples
from hrm_megatron.data.mixture import Mixture, Selection
from hrm_megatron.data.plan import RowPlan
from hrm_megatron.data.vocabulary import check_examples
from hrm_megatron.data.walk import Walk

Ids = np.ndarray  # [n] example ids


class PackedRows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """`num_rows` packed rows of `row_tokens` positions; row i holds the same examples in every process.

    `source` is a walk, or one indexed dataset from which `example_ids` selects examples. Training continues from epoch
    to epoch; `fixed=True`, for validation and test, repeats the rows of epoch 0, padded with empty rows up to `period`.
    Megatron reads from `split` whether a batch belongs to an evaluation.
    """

    split: Any = None

    def __init__(self, source: Walk | IndexedExamples, row_tokens: int, seed: int, num_rows: int,
                 example_ids: Ids | None = None, fixed: bool = False, cache_folder: str | Path | None = None,
                 causal: bool = False, loss_on_prefix: bool = False) -> None:
        if isinstance(source, IndexedExamples):
            source = Mixture([source], row_tokens, Selection(seed=seed), example_ids=example_ids)
        self.walk = source
        self.row_tokens = row_tokens
        self.num_rows = num_rows
        self.fixed, self.ablations = fixed, dict(causal=causal, loss_on_prefix=loss_on_prefix)
        self.plan = RowPlan(source, row_tokens, seed, cache_folder, num_rows=0 if fixed else num_rows)
        self.rows_per_epoch = self.period = len(self.plan.rows_of_epoch(0))
        self.passes, self.window, self.first = 1, 1, 0
        self.source_of: Callable[[int], int] | None = None  # example id -> source number, if rows are to carry it

    def __len__(self) -> int:
        return self.num_rows

    def read_again(self, passes: int, window: int, first: int) -> None:
        """Read each window of `window` rows `passes` times in a row; the first window begins at row `first`."""
        self.passes, self.window, self.first = passes, window, first

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        """Return `assemble_row` of the examples in row `row`."""
        if not 0 <= row < self.num_rows:
            raise IndexError(f"row {row} of {self.num_rows}")
        if self.passes > 1:
            turn, place = divmod(int(row) - self.first, self.passes * self.window)
            row = self.first + turn * self.window + place % self.window
        row = int(row) % self.period if self.fixed else int(row)
        if self.fixed and row >= self.rows_per_epoch:
            return assemble_row([], self.row_tokens)
        epoch, ids = self.plan.locate(row)
        examples = [self.walk.example(epoch, int(i)) for i in ids]
        check_examples(examples, self.walk.vocab_size, lambda i: self.walk.example_name(epoch, int(ids[i])))
        assembled = assemble_row(examples, self.row_tokens, **self.ablations)
        if self.source_of:
            assembled[SOURCES] = torch.zeros(self.row_tokens, dtype=torch.int64)
            assembled[SOURCES][:len(ids)] = torch.tensor([self.source_of(int(i)) for i in ids])
        return assembled

    def describe(self) -> str:
        """Return the number of examples and how full their rows are, in epoch 0."""
        rows = self.plan.rows_of_epoch(0)
        return (f"{len(rows.example_ids)} examples, {len(rows)} rows of {self.row_tokens} tokens per epoch, "
                f"{rows.tokens / (len(rows) * self.row_tokens):.1%} filled")
