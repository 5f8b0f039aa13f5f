"""Context parallel ranks read their slices of rows whose examples stand in the balanced order."""
import argparse
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hrm_megatron.parallel.cpu import activate

activate()

from hrm_megatron.attention.balance import balanced_order  # noqa: E402
from hrm_megatron.data.batch import PackedBatch, assemble_row  # noqa: E402
from hrm_megatron.parallel.context import context_positions  # noqa: E402
from hrm_megatron.training.step import TrainingStep  # noqa: E402

LENGTHS = [(3, 2), (5, 30), (20, 4)]  # in which order one rank of two has most of the pairs
ROW_TOKENS = 64


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_reads_its_slice_of_the_balanced_order(rank):
    tokens = iter(range(1, 1000))
    examples = [(np.array([next(tokens) for _ in range(p)]), np.array([next(tokens) for _ in range(r + 1)]))
                for p, r in LENGTHS]
    row = {name: tensor[None] for name, tensor in assemble_row(examples, ROW_TOKENS).items()}
    step = TrainingStep(argparse.Namespace(data_parallel_size=1, context_parallel_size=2))
    context = SimpleNamespace(size=lambda: 2, rank=lambda: rank)
    read, _ = step.micro_batch(iter([row]), SimpleNamespace(pg_collection=SimpleNamespace(cp=context),
                                                            sequences=lambda batch: None))
    order = balanced_order(LENGTHS, ROW_TOKENS, 2)
    assert order != [0, 1, 2]
    whole = PackedBatch.from_rows({name: tensor[None] for name, tensor in assemble_row(
        [examples[i] for i in order], ROW_TOKENS).items()})
    assert read.lengths == whole.lengths == (tuple(LENGTHS[i] for i in order),)
    at = context_positions(ROW_TOKENS, rank, 2)
    assert torch.equal(read.tokens, whole.tokens[:, at]) and torch.equal(read.labels, whole.labels[:, at])
