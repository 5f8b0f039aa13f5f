"""Baselines that can be written as an HRM: those with one stack in which the last tick of a cycle sums both states.

TRM is an HRM whose H stack shares the weights of its L stack. So is a Universal Transformer, with one cycle: z_H stays
the embedding until its last tick, which then is an H tick. A Transformer's tick reads only the embedding, and RINS's H
tick only z_L: neither can be an HRM.
"""
from __future__ import annotations

from dataclasses import replace

import torch

from hrm_megatron.convert.checkpoint import Checkpoint
from hrm_megatron.convert.table import Rename, table
from hrm_megatron.model_types import HRM


def as_hrm(checkpoint: Checkpoint) -> Checkpoint:
    """Return the equivalent HRM, with the stack written twice; the checkpoint itself if there is none."""
    a, t = checkpoint.architecture, checkpoint.training
    if a.model_type == HRM or a.kind.stacks != "L" or not a.kind.inner:
        return checkpoint
    inner = a.l_cycles if a.kind.outer else a.l_cycles - 1  # L ticks before the one that becomes an H tick
    if not inner:
        return checkpoint
    architecture = replace(a, model_type=HRM, l_cycles=inner)
    entries = {entry.megatron: entry for entry in table(a)}

    def read(part: str, entry: Rename) -> torch.Tensor:
        return checkpoint.read(part, entries[entry.megatron.replace("h_stack.", "l_stack.")])

    # An HRM has at least two gradient ticks; at inference the number has no effect.
    return replace(checkpoint, architecture=architecture, read=read,
                   training=replace(t, bp_min_steps=2, bp_max_steps=max(2, t.bp_max_steps)))
