"""`--log-loss-by-source`: write the loss of each source of the data to TensorBoard."""
from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.training import training as megatron_training

from hrm_megatron.data.batch import PackedBatch
from hrm_megatron.data.mixture import Mixture, SourceNames
from hrm_megatron.data.walk import Walk
from hrm_megatron.parallel.patching import around
from hrm_megatron.training.scalars import write_scalars, writes
from hrm_megatron.training.step import TrainingStep

MOST_CURVES = 64
CURVE = "loss by source"

log = logging.getLogger(__name__)


class SourceLosses:
    """Sums of a step's losses and counts of its labels by source, kept on the device."""

    def __init__(self, sources: SourceNames, measured: Callable[[], bool]) -> None:
        self.names, self.measured = sources.names, measured
        self.sums: torch.Tensor | None = None  # fp64 [2, sources]

    def add(self, batch: PackedBatch, losses: torch.Tensor) -> None:
        """Add a micro-batch with the losses [n] of its labels."""
        if not self.measured():
            return
        assert batch.example_source is not None
        if self.sums is None:
            self.sums = losses.new_zeros(2, len(self.names), dtype=torch.float64)
        source, values = batch.example_source[batch.label_example], losses.double()
        self.sums.index_add_(1, source, torch.stack([values, torch.ones_like(values)]))

    def take(self, group: Any) -> dict[str, float]:
        """Return the mean loss over the ranks of `group` for each source with a label, and reset."""
        sums, self.sums = self.sums, None
        if sums is None:  # only the last stage has losses
            return {}
        if group is not None:
            torch.distributed.all_reduce(sums, group=group)
        return {f"{CURVE}/{name}": total / count
                for name, total, count in zip(self.names, *sums.tolist(), strict=True) if count}


def find_sources(args: argparse.Namespace, walk: Walk) -> SourceNames | None:
    """Return the sources of the training data, or None if --log-loss-by-source is not given."""
    if not args.log_loss_by_source:
        return None
    assert isinstance(walk, Mixture)  # curve_flags.py refuses others
    sources, chosen = (walk.source_names(most) for most in (sys.maxsize, MOST_CURVES))
    if len(sources.names) == 1:
        log.info(f"data: --log-loss-by-source: all examples are of {sources.names[0]}, whose curve is that of the loss")
    if chosen.names != sources.names:
        log.info(f"data: losses are written for each dataset: {len(sources.names)} sources would be more than "
                 f"{MOST_CURVES} curves")
    return chosen


def install_source_losses(args: argparse.Namespace, step: TrainingStep, sources: SourceNames | None) -> None:
    """Collect losses by source in every step, and let Megatron's loop write them."""
    if sources is None:
        return
    losses = SourceLosses(sources, lambda: writes(args, step.running_step()))
    step.on_losses = losses.add

    def training_log(stock: Callable[..., bool], *given: Any, **options: Any) -> bool:
        report_memory = stock(*given, **options)
        iteration = given[3]
        if writes(args, iteration):
            write_scalars(losses.take(parallel_state.get_data_parallel_group(with_context_parallel=True)), iteration)
        return report_memory
    megatron_training.training_log = around(megatron_training.training_log, training_log)
