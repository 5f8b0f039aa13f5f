"""Time of a training step as a sum: work / speed, communication volume / bandwidth, and the pipeline bubble."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hrm_megatron.config import Architecture
from hrm_megatron.model.ticks import ticks_of
from hrm_megatron.planner.flops import score_elements, training_flops
from hrm_megatron.planner.layout import Layout, PipelinePlan, stage_parameters
from hrm_megatron.planner.machines import Cluster, Speeds
from hrm_megatron.planner.memory import Saving, chunk_rows

EXAMPLE = (288, 544)  # mean prefix and response of the benchmark's rows (benchmark/rows.py)
# States that the element-wise operations of a layer read and write in forward: norms 4, rotation 4, gate 3, residual
# sums 6; at the width of the MLP SwiGLU's 3. Backward twice that.
LAYER_TRAFFIC, GATE_TRAFFIC, FFN_TRAFFIC = 14, 3, 3
# Bytes per weight that an update reads and writes: master, both moments and EMA twice; gradient and bf16 weight once.
UPDATE_BYTES = 2 * 4 * 4 + 4 + 2
REDUCED_BYTES, GATHERED_BYTES = 4, 2  # fp32 gradients, bf16 weights


@dataclass(frozen=True)
class Work:
    """Cost of one tick forward over one micro-batch, for a rank with the layers of its stage: FLOPs, bytes, layer
    calls."""

    matmul: float
    attention: float
    traffic: float
    layers: int

    def seconds(self, speeds: Speeds, times: float = 1.0) -> float:
        """Return the seconds of `times` this work (2: a backward) in one call of each layer."""
        device = times * (self.matmul / speeds.matmul + self.attention / speeds.attention
                          + self.traffic / speeds.elementwise)
        host = self.layers * speeds.host_seconds
        return max(device, host) if speeds.hidden else device + host


def tick_work(architecture: Architecture, layout: Layout, layers: int, itemsize: int,
              example: tuple[int, int] = EXAMPLE) -> Work:
    """Return the work of one tick forward of one micro-batch, on a rank of a stage with `layers` layers of each
    stack."""
    h, ffn = architecture.hidden_size, architecture.ffn_hidden_size
    positions = layout.micro_batch_size * layout.row_tokens / layout.context
    pairs = positions * score_elements([example]) / sum(example)
    # Without sequence parallelism every tensor parallel rank repeats norms and sums.
    states = positions / layout.tensor if layout.sequence_parallel else positions
    traffic = LAYER_TRAFFIC + GATE_TRAFFIC * architecture.gated
    return Work(layers * 2 * architecture.layer_parameters * positions / layout.tensor,
                layers * 4 * h * pairs / layout.tensor,
                layers * (traffic * h + FFN_TRAFFIC * ffn) * states * itemsize, layers)


def head_flops(architecture: Architecture, layout: Layout, labels: float) -> float:
    """Return the FLOPs of the head for one micro-batch on a rank: forward, backward, and recompute of all but the last
    chunk of logits (model/head.py)."""
    count = labels * layout.micro_batch_size * layout.row_tokens / layout.context
    width = architecture.padded_vocab_size / layout.tensor
    again = max(0.0, 1 - chunk_rows(architecture, layout) / count)
    return (3 + again) * 2 * architecture.hidden_size * width * count


@dataclass(frozen=True)
class Step:
    """Seconds of a step by part, its tokens and FLOPs; times on GPUs are predictions."""

    parts: dict[str, float]
    tokens: int
    flops: float
    ranks: int
    bubble: float

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def tokens_per_second(self) -> float:
        """Tokens/s per rank."""
        return self.tokens / self.seconds / self.ranks

    def mfu(self, peak: float) -> float:
        return self.flops / self.seconds / self.ranks / peak


def predict_step(architecture: Architecture, layout: Layout, layers: Sequence[int], saving: Saving, cluster: Cluster,
                 plan: PipelinePlan | None = None, example: tuple[int, int] = EXAMPLE) -> Step:
    """Predict one step. Only the messages of a pipeline are assumed to overlap; the simulation includes their latency.
    A pipeline is as fast as its slowest stage plus the bubble of the simulation."""
    speeds = cluster.speeds
    ticks = ticks_of(architecture, saving.bp_steps, saving.recompute_ticks)
    gradients = sum(tick.with_grad for tick in ticks)
    again = sum(tick.recompute for tick in ticks)
    labels = (example[1] + 1) / sum(example)
    slowest: dict[str, float] = {}
    for stage, n in enumerate(layers):
        work = tick_work(architecture, layout, n, saving.itemsize, example)
        forward = work.seconds(speeds)
        recomputed = again * forward
        if saving.gated_act:
            activations = n * (3 * architecture.hidden_size + 3 * architecture.ffn_hidden_size)
            recomputed += (gradients * activations * layout.micro_batch_size * layout.row_tokens / layout.context
                           / layout.tensor * saving.itemsize / speeds.elementwise)
        parts = {"layers": len(ticks) * forward + gradients * work.seconds(speeds, 2), "recomputation": recomputed,
                 "tensor parallel": _tensor_seconds(architecture, layout, n, saving, cluster, len(ticks) + again,
                                                    gradients),
                 "context parallel": _context_seconds(architecture, layout, n, saving, cluster, len(ticks) + again,
                                                      gradients),
                 "head": head_flops(architecture, layout, labels) / speeds.matmul * (stage == len(layers) - 1)}
        slowest = max(slowest, parts, key=lambda parts: sum(parts.values()))
    parts = {name: layout.microbatches * seconds for name, seconds in slowest.items()}
    bubble = plan.estimate.bubble if plan else 0.0
    parts["bubble"] = sum(parts.values()) * bubble / (1 - bubble)
    weights = max(stage_parameters(architecture, layers)) / layout.tensor
    shards = layout.replicas * layout.context
    # Data parallel ranks are strided over tensor parallel ones, so they span nodes unless all fit into one.
    volume = (shards - 1) / shards * weights * (REDUCED_BYTES + GATHERED_BYTES)
    parts["data parallel"] = volume / cluster.link(shards, layout.tensor) if shards > 1 else 0.0
    parts["optimizer"] = weights / shards * UPDATE_BYTES / speeds.optimizer
    tokens = layout.rows * layout.row_tokens
    flops = training_flops(architecture, saving.bp_steps, tokens, round(labels * tokens),
                           round(tokens * score_elements([example]) / sum(example)))
    return Step(parts, tokens, flops, layout.ranks, bubble)


def _tensor_seconds(architecture: Architecture, layout: Layout, layers: int, saving: Saving, cluster: Cluster,
                    forwards: int, backwards: int) -> float:
    """Return the seconds of tensor parallel communication: a layer gathers and scatters its states twice in forward (an
    all-reduce is both) and in backward, where it also gathers the inputs of both column parallel matmuls again."""
    tp = layout.tensor
    if tp == 1:
        return 0.0
    state = layout.micro_batch_size * layout.row_tokens / layout.context * architecture.hidden_size * saving.itemsize
    transfers = 4 * forwards + (6 if layout.sequence_parallel else 4) * backwards
    return layers * transfers * state * (tp - 1) / tp / cluster.link(tp)


def _context_seconds(architecture: Architecture, layout: Layout, layers: int, saving: Saving, cluster: Cluster,
                     forwards: int, backwards: int) -> float:
    """Return the seconds of context parallel communication: keys and values of whole rows are gathered in forward,
    their gradients reduce-scattered in backward."""
    cp = layout.context
    if cp == 1:
        return 0.0
    row = layout.micro_batch_size * layout.row_tokens * architecture.hidden_size * saving.itemsize / layout.tensor
    return layers * (forwards + backwards) * 2 * row * (cp - 1) / cp / cluster.link(cp, layout.tensor)
