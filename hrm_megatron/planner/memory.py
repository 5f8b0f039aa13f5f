"""Memory of a training step as sums over tensor shapes, known before a run; fragmentation of the allocator is not
included."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hrm_megatron.config import HEAD_CHUNK_BYTES, Architecture, LoRA
from hrm_megatron.model.ticks import ticks_of
from hrm_megatron.planner.layout import GRADIENT_BYTES, Layout, PipelinePlan, counted, weight_bytes

BF16, FP32 = 2, 4  # bytes per element
CUDA_CONTEXT = 2 << 30  # assumed: CUDA context, NCCL buffers, cuBLAS workspace


def kept_tensors(architecture: Architecture, gated_act: bool = False, context: int = 1) -> list[float]:
    """Return the sizes of the tensors that one layer saves for backward on a GPU, in units of a state [s, b, h].

    These are: outputs of both norms; queries, keys, values and gate; attention's output before and after the gate; the
    residual sum after attention; keys and values of prefixes, a quarter of the positions, a second time; both halves of
    the MLP's first product, and SwiGLU. `gated_act` (recomputed) leaves out SwiGLU and the gated output. With `context`
    parallelism a rank keeps keys and values of whole rows. tests/te counts them with stand-ins for the kernels.
    """
    ffn, gated = architecture.ffn_hidden_size / architecture.hidden_size, architecture.gated
    return ([1.0] * (5 + gated) + [1.0 * context] * 2 + [0.25 * context] * 2 + [2 * ffn]
            + ([] if gated_act else [*[1.0] * gated, ffn]))


def kept_tensors_on_cpu(architecture: Architecture, rows: int) -> list[float]:
    """Return the same for a CPU, whose kernels save other tensors: the fused QKV and gate buffer, which the values keep
    alive, besides rotated queries and keys. Several rows are stacked after attention."""
    ffn, gated = architecture.ffn_hidden_size / architecture.hidden_size, architecture.gated
    return [1.0] * (6 + gated + (rows > 1)) + [3.0 + gated] + [2 * ffn, ffn]


def layer_states(architecture: Architecture, gated_act: bool = False, context: int = 1) -> float:
    """Return the size of all that one layer saves for backward, in units of a state [s, b, h]."""
    return sum(kept_tensors(architecture, gated_act, context))


@dataclass(frozen=True)
class Saving:
    """What determines the memory of a step: gradient ticks, recompute, bytes per element, labels per position (at most
    1), what FSDP shards besides the optimizer state, adapters if only those are trained, FP8 copies of the weights (a
    byte per weight and, before Blackwell, one for its transpose), and bytes per gradient element."""

    bp_steps: int = 5
    recompute_ticks: int = 0
    gated_act: bool = False
    itemsize: int = BF16
    labels: float = 1.0
    on_cpu: bool = False
    sharded: tuple[str, ...] = ()
    lora: LoRA | None = None
    fp8_copies: bool = False
    gradient_itemsize: int = GRADIENT_BYTES


@dataclass(frozen=True)
class Memory:
    """Peak bytes on a rank of pipeline stage `stage`, by part; `ticks` splits the activations by tick."""

    stage: int
    parts: dict[str, float]
    ticks: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())


def memory_of_stages(architecture: Architecture, layout: Layout, layers: Sequence[int], saving: Saving,
                     plan: PipelinePlan | None = None) -> list[Memory]:
    """Predict the memory of a rank of each stage; `plan` is the schedule of a pipeline."""
    return [_stage(architecture, layout, layers, stage, saving, plan) for stage in range(len(layers))]


def fullest(architecture: Architecture, layout: Layout, layers: Sequence[int], saving: Saving,
            plan: PipelinePlan | None = None) -> Memory:
    """Predict the memory of the stage that needs most. All stages between the first and the last are alike."""
    stages = {0, min(1, len(layers) - 1), len(layers) - 1}
    return max((_stage(architecture, layout, layers, stage, saving, plan) for stage in sorted(stages)),
               key=lambda memory: memory.total)


def _stage(architecture: Architecture, layout: Layout, layers: Sequence[int], stage: int, saving: Saving,
           plan: PipelinePlan | None) -> Memory:
    weights, trained = (count / layout.tensor for count in counted(architecture, layers, saving.lora)[stage])
    each = weight_bytes(saving.itemsize, layout.replicas * layout.context, saving.sharded, saving.gradient_itemsize)
    parts = {"weights": weights * each.weights, "gradients": trained * each.gradients,
             "masters": trained * each.masters, "moments": trained * each.moments, "EMA": trained * each.ema}
    if saving.fp8_copies:
        of_layers = len(architecture.kind.stacks) * layers[stage] * architecture.layer_parameters / layout.tensor
        parts["FP8 weights"] = 2 * of_layers
    # Bytes of a state [s, b, h] on a rank.
    positions = layout.micro_batch_size * layout.row_tokens
    state = positions / layout.cuts * architecture.hidden_size * saving.itemsize
    ticks = activations_by_tick(architecture, layout, layers[stage], saving, plan)
    # Besides the activations: the head's memory or that of one layer's backward, whichever is larger.
    ffn = architecture.ffn_hidden_size / architecture.hidden_size
    working = (3 * ffn + 2) * state
    head = _head_bytes(architecture, layout, saving) if stage == len(layers) - 1 else 0.0
    parts |= {"activations": sum(ticks.values()), "head, or work on a layer": max(working, head),
              "communication": _communication_bytes(architecture, layout, saving),
              "parked states": plan.parked * state if plan and stage == 0 else 0.0}
    if saving.on_cpu:  # the eager update, once activations are freed, takes two temporaries of the state's size
        table = architecture.padded_vocab_size * architecture.hidden_size if stage == 0 else 0
        of_table = 0.0 if saving.lora else table / layout.tensor
        update = 2 * FP32 * (trained - of_table) / (layout.replicas * layout.context)
        passing = sum(parts[name] for name in ("activations", "head, or work on a layer", "communication"))
        parts["optimizer's step"] = max(0.0, update - passing)
    else:
        parts["CUDA and NCCL (assumed)"] = float(CUDA_CONTEXT)
    return Memory(stage, parts, ticks)


def activations_by_tick(architecture: Architecture, layout: Layout, layers: int, saving: Saving,
                        plan: PipelinePlan | None = None) -> dict[str, float]:
    """Return the peak bytes that each tick with gradient keeps on a rank with `layers` layers of each stack.

    A pipeline has several micro-batches in flight: the live graphs that the simulation counts are divided evenly among
    the ticks.
    """
    state = layout.micro_batch_size * layout.row_tokens / layout.cuts * architecture.hidden_size * saving.itemsize
    if saving.on_cpu:
        layer = sum(kept_tensors_on_cpu(architecture, layout.micro_batch_size))
    else:
        layer = layer_states(architecture, saving.gated_act, layout.context)
        if not layout.sequence_parallel:  # both norms and the sum after attention are replicated
            layer = (layer - 3) / layout.tensor + 3
    built = (layer * layers + 1) * state  # + 1: the norm after the stack, or its input
    ticks = ticks_of(architecture, saving.bp_steps, saving.recompute_ticks)
    copies = plan.estimate.live_graphs / saving.bp_steps if plan else 1.0
    kept = {f"{tick.stack}{number}": copies * (state if tick.recompute else built)
            for number, tick in enumerate(ticks) if tick.with_grad}
    first = next(iter(kept))
    if saving.recompute_ticks and (plan or saving.recompute_ticks >= saving.bp_steps):
        kept[first] += built  # the graph being recomputed
    return kept


def chunk_rows(architecture: Architecture, layout: Layout) -> float:
    """Return the most labels whose logits a rank holds at a time (model/head.py)."""
    return HEAD_CHUNK_BYTES / (FP32 * architecture.padded_vocab_size / layout.tensor)


def _head_bytes(architecture: Architecture, layout: Layout, saving: Saving) -> float:
    """Return the bytes of the states at labels, of a chunk of logits, and of the gradient computed from it."""
    width = architecture.padded_vocab_size / layout.tensor
    labels = saving.labels * layout.micro_batch_size * layout.row_tokens / layout.context
    rows = min(labels, chunk_rows(architecture, layout))
    return (labels * architecture.hidden_size * saving.itemsize
            + rows * width * (saving.itemsize + (FP32 if saving.on_cpu else saving.itemsize)))


def _communication_bytes(architecture: Architecture, layout: Layout, saving: Saving) -> float:
    """Return the bytes of states gathered over tensor parallel ranks and of the gradients of gathered keys and
    values."""
    whole = layout.micro_batch_size * layout.row_tokens * architecture.hidden_size * saving.itemsize
    gathered = 2 * whole / layout.context if layout.tensor > 1 and layout.sequence_parallel else 0.0
    return gathered + (2 * whole / layout.tensor if layout.context > 1 else 0.0)
