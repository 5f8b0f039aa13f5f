"""Who owns which layers in a pipeline, and how many micro-batches take turns: plain arithmetic."""
from __future__ import annotations

from hrm_megatron.config import Architecture, ConfigError


def head_in_layers(architecture: Architecture, ticks_with_gradient: int) -> float:
    """Cost of the head in layers of a stage, by multiplications; every label counted, forward and backward.

    A stage's n layers run at every tick of their stack, and twice more in the backward of those with gradient.
    """
    ticks = architecture.num_ticks
    head = architecture.padded_vocab_size * architecture.hidden_size
    return 3 * head / ((ticks + 2 * ticks_with_gradient) * architecture.layer_parameters)


def stage_layers(num_layers: int, stages: int, head_layers: float) -> list[int]:
    """Cut `num_layers` layers of each stack: the slowest stage as fast as can be, then all as even, the last lightest.

    The last stage also has the head, worth `head_layers`. All stages between the first and the last own equally
    many (Megatron counts so), and every stage at least one.
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
    """Smallest number of micro-batches per visit of a virtual chunk that Megatron's interleaved schedule accepts.

    It must be at least `stages` and leave a remainder of none or at least `stages`; more costs memory.
    """
    if microbatches < stages:
        raise ConfigError(f"{microbatches} micro-batches per step are fewer than the {stages} pipeline stages: raise "
                          f"--global-batch-size to {stages} micro-batches per replica, or lower "
                          "--pipeline-model-parallel-size")
    return next(n for n in range(stages, microbatches + 1) if microbatches % n == 0 or microbatches % n >= stages)


def microbatch_windows(microbatches: int, stages: int, window: int | None) -> list[range]:
    """Cut a step's micro-batches into windows of `window` (None: one of all), each of at least `stages`."""
    if window is None:
        return [range(microbatches)]
    if window < stages:
        raise ConfigError(f"--pipeline-window {window} is less than the {stages} pipeline stages: give at least "
                          f"{stages}")
    starts = [start for start in range(0, microbatches, window) if not start or microbatches - start >= stages]
    return [range(start, end) for start, end in zip(starts, [*starts[1:], microbatches], strict=True)]
