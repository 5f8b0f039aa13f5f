"""How many rows a micro-batch has where nobody says: enough that a GPU does not wait for its host."""
from __future__ import annotations

import argparse

# By the sums of planner/flops.py a layer of XL takes a GPU 0.7 ms for 4,096 positions at 600 TFLOP/s, about what its
# host takes to launch it: four times as many leave it time. `python tools/benchmark.py host` counts the launches.
POSITIONS = 16_384


def choose_rows(args: argparse.Namespace, most_positions: int) -> int:
    """Return the fewest rows with POSITIONS on a GPU, or as many as `most_positions` allow.

    They divide the rows of a replica's step. A pipeline takes one, because it waits less with many micro-batches, and
    so does a model of which nothing is known (0).
    """
    if not most_positions:
        return 1
    stages, context = args.pipeline_model_parallel_size, args.context_parallel_size
    replicas = args.world_size // (args.tensor_model_parallel_size * stages * context)
    of_a_row = max(1, args.seq_length // context)
    if stages > 1 or not replicas or (args.global_batch_size or 0) % replicas:
        return 1  # the layout is refused later, by its own reason
    wanted = -(-POSITIONS // of_a_row)
    of_a_step = args.global_batch_size // replicas if args.global_batch_size else wanted
    fit = [rows for rows in range(1, of_a_step + 1) if of_a_step % rows == 0 and rows * of_a_row <= most_positions]
    return next((rows for rows in fit if rows >= wanted), fit[-1] if fit else 1)
