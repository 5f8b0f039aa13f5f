"""Parallel layout of a model: divisibility, layers per stage and bytes per weight. Plain arithmetic, used by the
command line, the dry run and the planner."""
from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from hrm_megatron.config import Architecture, ConfigError, LoRA
from hrm_megatron.model.ticks import states_between, ticks_of
from hrm_megatron.parallel.simulate import AUTO, Estimate, second_phase, stock, two_phase
from hrm_megatron.parallel.stages import head_in_layers, microbatch_group, microbatch_windows, stage_layers

GRADIENT_BYTES, STATE_BYTES = 4, 4  # gradient reduction and optimizer state are fp32


@dataclass(frozen=True)
class Layout:
    """Ranks of a run and rows of its step; `tensor`, `pipeline` and `context` are Megatron's parallel sizes."""

    ranks: int
    tensor: int = 1
    pipeline: int = 1
    context: int = 1
    sequence_parallel: bool = False
    row_tokens: int = 4096
    micro_batch_size: int = 1
    global_batch_size: int | None = None

    @property
    def model_ranks(self) -> int:
        """Ranks that together hold one model replica."""
        return self.tensor * self.pipeline * self.context

    @property
    def replicas(self) -> int:
        return self.ranks // self.model_ranks

    @property
    def rows(self) -> int:
        """Rows of a step; by default one micro-batch on each replica."""
        return self.global_batch_size or self.micro_batch_size * self.replicas

    @property
    def microbatches(self) -> int:
        """Micro-batches of a step on each replica."""
        return self.rows // (self.micro_batch_size * self.replicas)

    @property
    def cuts(self) -> int:
        """Number of ranks over which the positions of a micro-batch are sharded between layers."""
        return self.context * (self.tensor if self.sequence_parallel else 1)


def check_division(architecture: Architecture, layout: Layout) -> None:
    """Refuse parallel sizes that do not divide the architecture, the rows or the ranks, and name sizes that work."""
    tp, row_tokens = layout.tensor, layout.row_tokens
    for name, size in (("attention heads", architecture.num_attention_heads),
                       ("FFN columns", architecture.ffn_hidden_size),
                       ("padded vocabulary", architecture.padded_vocab_size)):
        if size % tp:
            divisors = [d for d in range(1, min(size, 64) + 1) if size % d == 0]
            raise ConfigError(f"--tensor-model-parallel-size {tp} does not divide the {size} {name}: "
                              f"choose one of {', '.join(map(str, divisors))}")
    slices = (2 if layout.context > 1 else 1) * layout.cuts
    if row_tokens % slices:
        flag = (f"--context-parallel-size {layout.context}" if layout.context > 1 else
                f"--sequence-parallel with --tensor-model-parallel-size {tp}")
        raise ConfigError(f"{flag} cuts a row into {slices} pieces, but --seq-length {row_tokens} is no multiple of "
                          "that: choose one")
    if layout.ranks % layout.model_ranks:
        raise ConfigError(f"{layout.ranks} processes cannot be divided into model replicas of {layout.model_ranks}: "
                          f"start a multiple of {layout.model_ranks}")


def check_rows(rows: int | None, micro_batch_size: int, replicas: int, prefix: str = "") -> None:
    """Refuse a step whose `rows` are no multiple of micro-batch size x replicas; flag names begin with `prefix`."""
    unit = micro_batch_size * replicas
    if rows and rows % unit:
        near = [multiple for multiple in (rows // unit * unit, (rows // unit + 1) * unit) if multiple]
        raise ConfigError(f"--{prefix}global-batch-size {rows}: is no multiple of {unit}, which is --{prefix}"
                          f"micro-batch-size {micro_batch_size} x {replicas} replicas; choose "
                          f"{' or '.join(map(str, near))}")


def check_fp8(hidden_size: int, ffn_hidden_size: int, layout: Layout, multiple: int, recipe: str) -> None:
    """Refuse sizes per rank that FP8 matmuls of this recipe do not support."""
    for what, size in (("positions", layout.row_tokens * layout.micro_batch_size // layout.cuts),
                       ("hidden channels", hidden_size // layout.tensor),
                       ("FFN channels", ffn_hidden_size // layout.tensor)):
        if size % multiple:
            raise ConfigError(f"--fp8-recipe {recipe}: {size} {what} on a rank are no multiple of {multiple}; "
                              "change --seq-length, the sizes or the layout, or leave --fp8-format out")


def check_pipeline(layout: Layout, window: int | None = None) -> None:
    """Refuse steps with fewer micro-batches than stages, or a `window` that does not work."""
    if layout.pipeline > 1:
        microbatch_group(layout.microbatches, layout.pipeline)
        microbatch_windows(layout.microbatches, layout.pipeline, window)


def check_stages(num_layers: int, stages: int, first: int | None, last: int | None) -> None:
    """Refuse numbers of layers on the first and last stage (None: as many as the others) that leave unequal shares to
    the other stages."""
    given = {flag: layers for flag, layers in (("--decoder-first-pipeline-num-layers", first),
                                               ("--decoder-last-pipeline-num-layers", last)) if layers is not None}
    others, left = stages - len(given), num_layers - sum(given.values())
    if given and (min(given.values()) < 1 or (left % others or left < others if others else left)):
        raise ConfigError(f"{' '.join(f'{flag} {layers}' for flag, layers in given.items())}: leaves {left} of "
                          f"{num_layers} layers of each stack for the other {others} stages, each of which has as many "
                          "as the next and one at least; give others, or leave both flags out")


def check(architecture: Architecture, layout: Layout, most_bp_steps: int) -> list[int]:
    """Refuse a layout for any of the reasons above; else return the layers per stack on each stage."""
    check_division(architecture, layout)
    check_rows(layout.global_batch_size, layout.micro_batch_size, layout.replicas)
    check_pipeline(layout)
    return cut_layers(architecture, layout.pipeline, most_bp_steps)


def cut_layers(architecture: Architecture, stages: int, most_bp_steps: int) -> list[int]:
    """Return the default layers per stack on each stage."""
    if stages == 1:
        return [architecture.num_layers]
    return stage_layers(architecture.num_layers, stages, head_in_layers(architecture, most_bp_steps))


def stage_parameters(architecture: Architecture, layers: Sequence[int]) -> list[int]:
    """Return the number of weights of each pipeline stage, over all its tensor parallel ranks."""
    table = architecture.padded_vocab_size * architecture.hidden_size  # embedding on the first stage, head on the last
    counts = [len(architecture.kind.stacks) * architecture.layer_parameters * n for n in layers]
    counts[0] += table
    counts[-1] += table
    return counts


def counted(architecture: Architecture, layers: Sequence[int], lora: LoRA | None) -> list[tuple[int, int]]:
    """Return (weights, trained weights) of each pipeline stage, over all its tensor parallel ranks. Replicated factors
    of adapters are counted as if sharded."""
    found = []
    for n, weights in zip(layers, stage_parameters(architecture, layers), strict=True):
        adapters = len(architecture.kind.stacks) * n * lora.layer_parameters(architecture) if lora else 0
        found.append((weights + adapters, adapters if lora else weights))
    return found


@dataclass(frozen=True)
class WeightBytes:
    """Bytes that a rank holds per weight of its stage and tensor parallel shard."""

    weights: float
    gradients: float
    masters: float
    moments: float
    ema: float

    @property
    def optimizer(self) -> float:
        return self.masters + self.moments + self.ema

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer


def weight_bytes(itemsize: int, shards: int, sharded: Sequence[str] = (),
                 gradient_itemsize: int = GRADIENT_BYTES) -> WeightBytes:
    """Return the bytes per weight with the optimizer state, and whatever `sharded` names, sharded over `shards` ranks;
    `itemsize` is that of the weights.

    fp32 weights have no separate master weights.
    """
    return WeightBytes(itemsize / (shards if "weights" in sharded else 1),
                       gradient_itemsize / (shards if "gradients" in sharded else 1),
                       STATE_BYTES * (itemsize < STATE_BYTES) / shards, 2 * STATE_BYTES / shards, STATE_BYTES / shards)


@dataclass(frozen=True)
class PipelinePlan:
    """The schedule of a step: `first` is the first tick of its second phase (0: one phase), `parked` the number of
    states [rows of a micro-batch, s, h] that the first stage keeps between the phases."""

    first: int
    windows: int
    parked: int
    estimate: Estimate


@functools.lru_cache(maxsize=4096)
def plan_pipeline(architecture: Architecture, bp_steps: int, microbatches: int, stages: int, schedule: str = AUTO,
                  window: int | None = None) -> PipelinePlan:
    """Simulate the schedule of a step with `bp_steps` gradient ticks."""
    ticks = ticks_of(architecture, bp_steps)
    with_grad = [tick.with_grad for tick in ticks]
    if first := second_phase(schedule, with_grad, microbatches, stages, window):
        windows = microbatch_windows(microbatches, stages, window)
        return PipelinePlan(first, len(windows), states_between(ticks, first) * max(map(len, windows)),
                            two_phase(microbatches, with_grad, stages, window))
    return PipelinePlan(0, 0, 0, stock(microbatches, with_grad, stages))
