"""FLOPs of a training step, from the architecture; a multiply-add counts as 2."""
from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import chain

from hrm_megatron.config import Architecture, LoRA
from hrm_megatron.model.ticks import ticks_of
from hrm_megatron.optim.schedule import BPSchedule


def steps_by_bp(schedule: BPSchedule) -> dict[int, int]:
    """Return {bp_steps: number of steps of the run with that many gradient ticks}. bp_steps never falls, so only its
    rises are searched."""
    steps, counts, done = range(1, schedule.total_steps + 1), dict[int, int](), 0
    while done < len(steps):
        bp_steps, before = schedule.at(done + 1), done
        done = bisect_right(steps, bp_steps, lo=done, key=schedule.at)
        counts[bp_steps] = done - before
    return counts


def score_elements(lengths: Iterable[tuple[int, int]]) -> int:
    """Return the number of (query, key) pairs of packed examples: prefixes attend to the whole prefix, responses
    causally."""
    return sum(p * p + r * p + r * (r + 1) // 2 for p, r in lengths)


def training_flops(architecture: Architecture, bp_steps: int, tokens: int, labels: int, scores: int = 0,
                   lora: LoRA | None = None) -> int:
    """Return the FLOPs of `tokens` positions, `labels` of them with a label, and `scores` (query, key) pairs.

    Every tick runs its stack's layers forward, those with gradient also backward, at twice the cost. The head is
    applied to labels only. A pair costs 2 multiplications per channel forward, in Q K^T and in P V. Element-wise
    operations, recompute and the optimizer are not counted, as in MFU (Chowdhery et al., arXiv 2204.02311, appendix B).
    With `lora` the adapters' matmuls are added; the frozen weights have no gradient, so their backward costs as much as
    the forward.
    """
    h = architecture.hidden_size
    ticks = ticks_of(architecture, bp_steps)
    passes = sum(3 if tick.with_grad else 1 for tick in ticks) * architecture.num_layers
    of_weights = 3 if lora is None else 2  # with the backward
    of_matmuls = sum(of_weights if tick.with_grad else 1 for tick in ticks) * architecture.num_layers
    adapters = lora.layer_parameters(architecture) if lora else 0
    stacks = (of_matmuls * 2 * architecture.layer_parameters * tokens
              + passes * (2 * adapters * tokens + 4 * h * scores))
    return stacks + of_weights * 2 * h * architecture.padded_vocab_size * labels


def rows_flops(architecture: Architecture, bp_steps: int, row_tokens: int,
               rows: Sequence[Sequence[tuple[int, int]]], labels: int | None = None, lora: LoRA | None = None) -> int:
    """Return the FLOPs of packed rows of `row_tokens` positions; each row lists its examples' (prefix, response)
    lengths.

    `labels` is their number; None: derived from the responses, which works for PrefixLM only, not for a causal model.
    """
    examples = [*chain.from_iterable(rows)]
    if labels is None:
        labels = sum(response + 1 for _, response in examples)  # the last position of the prefix has a label too
    return training_flops(architecture, bp_steps, row_tokens * len(rows), labels, score_elements(examples), lora)
