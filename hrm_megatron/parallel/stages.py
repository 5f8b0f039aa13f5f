"""Split of the layers over pipeline stages, and of a step's micro-batches into groups and windows."""
from __future__ import annotations

from hrm_megatron.config import Architecture, ConfigError


def head_in_layers(architecture: Architecture, ticks_with_gradient: int) -> float:
    """Return the cost of the head relative to one layer of each stack, in multiplications of forward and backward, with
    every position labelled.

    At every tick one of the two stacks runs; the backward of a tick with gradient costs two more forwards.
    """
    ticks = architecture.num_ticks
    head = architecture.padded_vocab_size * architecture.hidden_size
    return 3 * head / ((ticks + 2 * ticks_with_gradient) * architecture.layer_parameters)


def stage_layers(num_layers: int, stages: int, head_layers: float) -> list[int]:
    """Return the number of layers of each stack per stage: the slowest stage as fast as possible, then the most even
    split, then the lightest last stage.

    The last stage also has the head, which costs as much as `head_layers` layers. All stages between the first and the
    last get the same number (Megatron's rule), and every stage at least one layer. Raises ConfigError if impossible.
    """
    cuts = [[first, *[middle] * (stages - 2), last]
            for middle in (range(1, num_layers + 1) if stages > 2 else (0,))
            for last in range(1, num_layers + 1)
            if (first := num_layers - middle * (stages - 2) - last) >= 1]
    if not cuts:
        raise ConfigError(f"--pipeline-model-parallel-size {stages} leaves stages without one of the {num_layers} "
                          f"layers of each stack: choose at most {num_layers}")
    return min(cuts, key=lambda cut: (max(*cut[:-1], cut[-1] + head_layers), max(cut) - min(cut), cut[::-1]))


def microbatch_group(microbatches: int, stages: int) -> int:
    """Return the smallest microbatch_group_size_per_vp_stage that Megatron's interleaved schedule accepts.

    It must be at least `stages`, and so must a smaller last group; a larger one needs more memory.
    """
    if microbatches < stages:
        raise ConfigError(f"{microbatches} micro-batches per step are fewer than the {stages} pipeline stages: raise "
                          f"--global-batch-size to {stages} micro-batches per replica, or lower "
                          "--pipeline-model-parallel-size")
    return next(n for n in range(stages, microbatches + 1) if microbatches % n == 0 or microbatches % n >= stages)


def microbatch_windows(microbatches: int, stages: int, window: int | None) -> list[range]:
    """Cut a step's micro-batches into windows of `window` (None: one window), each of at least `stages`; too small a
    remainder joins the window before it."""
    if window is None:
        return [range(microbatches)]
    if window < stages:
        raise ConfigError(f"--pipeline-window {window} is less than the {stages} pipeline stages: give at least "
                          f"{stages}")
    starts = [start for start in range(0, microbatches, window) if not start or microbatches - start >= stages]
    return [range(start, end) for start, end in zip(starts, [*starts[1:], microbatches], strict=True)]
