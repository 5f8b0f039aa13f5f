"""Default micro-batch size: enough rows that the GPU is not launch-bound."""
from __future__ import annotations

import argparse

# By planner/flops.py a GPU at 600 TFLOP/s runs a layer of XL on 4,096 positions in 0.7 ms, about the host's launch time
# for it; four times as many leave a margin. `python tools/benchmark.py host` counts the launches.
POSITIONS = 16_384


def choose_rows(args: argparse.Namespace, most_positions: int) -> int:
    """Return the smallest number of rows with at least POSITIONS positions on a GPU, or the largest that
    `most_positions` allows.

    It divides the rows of a replica's step. It is 1 with a pipeline, whose bubble shrinks with more micro-batches, and
    for a model whose limit is unknown (`most_positions` 0).
    """
    if not most_positions:
        return 1
    stages, context = args.pipeline_model_parallel_size, args.context_parallel_size
    replicas = args.world_size // (args.tensor_model_parallel_size * stages * context)
    of_a_row = max(1, args.seq_length // context)
    if stages > 1 or not replicas or (args.global_batch_size or 0) % replicas:
        return 1  # the layout is refused later, with its own reason
    wanted = -(-POSITIONS // of_a_row)
    of_a_step = args.global_batch_size // replicas if args.global_batch_size else wanted
    fit = [rows for rows in range(1, of_a_step + 1) if of_a_step % rows == 0 and rows * of_a_row <= most_positions]
    return next((rows for rows in fit if rows >= wanted), fit[-1] if fit else 1)
