"""How many rows of a micro-batch are chosen where nobody says."""
import argparse

import pytest

from hrm_megatron.config import PRESETS
from hrm_megatron.training.micro_batch import choose_rows


def chosen(preset, ranks, rows, row_tokens=4096, tp=1, pp=1, cp=1):
    return choose_rows(argparse.Namespace(
        world_size=ranks, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp, context_parallel_size=cp,
        seq_length=row_tokens, global_batch_size=rows), PRESETS[preset].positions if preset else 0)


@pytest.mark.parametrize("ranks, rows", [(1, 4), (2, 4), (4, 4), (8, 6), (16, 3), (48, 1)])
def test_as_few_rows_as_keep_a_gpu_busy_or_all_there_are(ranks, rows):
    assert chosen("B", ranks, 48) == rows


@pytest.mark.parametrize("preset, ranks, of_a_step, options, rows", [
    ("B", 8, None, {}, 4),  # the step follows the micro-batch
    ("B", 8, 48, dict(row_tokens=256), 6), ("B", 1, 48, dict(row_tokens=20_000), 1),
    ("XL", 8, 48, {}, 2), ("XXL", 8, 64, {}, 1),  # by memory
    ("XL", 8, 48, dict(cp=2), 4),  # a rank holds half of each row
    ("B", 8, 48, dict(pp=2), 1),  # many micro-batches fill a pipeline
    ("B", 8, 48, dict(tp=2), 4), (None, 8, 48, {}, 1),
    ("B", 5, 48, {}, 1), ("B", 1, 48, dict(tp=2), 1)])  # refused later
def test_steps_layouts_and_memory_are_respected(preset, ranks, of_a_step, options, rows):
    assert chosen(preset, ranks, of_a_step, **options) == rows
