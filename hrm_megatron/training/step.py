"""What one training step does between Megatron's schedule and the model."""
from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.utils import unwrap_model

from hrm_megatron.data.batch import PackedBatch
from hrm_megatron.model.hrm import HRMModel
from hrm_megatron.model.schedule import trains_embedding
from hrm_megatron.training.arguments import bp_schedule, model_config
from hrm_megatron.training.metrics import Report, ThroughputMeter, loss_sums
from hrm_megatron.training.overlap import OverlappedReduction


class TrainingStep:
    """The functions that Megatron's loop calls, with the arguments of the run in their hands."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.bp_schedule = bp_schedule(args)
        self.meter = ThroughputMeter(args.data_parallel_size)
        self.reduction = OverlappedReduction()

    def build_model(self, pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None,
                    config: Any = None, pg_collection: Any = None) -> HRMModel:
        """Build this rank's part of the model (Megatron's `model_provider`)."""
        return HRMModel(config or model_config(self.args), self.args.seed, pre_process, post_process,
                        pg_collection=pg_collection, vp_stage=vp_stage)

    @property
    def bp_steps(self) -> int:
        """Gradient ticks of the step that is running; Megatron counts steps from 0."""
        return self.bp_schedule.at(self.args.curr_iteration + 1)

    def embedding_has_gradient(self) -> bool:
        """Tell the optimizer whether the step that is running has a graph down to the embedding."""
        return trains_embedding(self.args.h_cycles, self.bp_steps)

    def forward(self, data_iterator: Iterator[dict[str, torch.Tensor]],
                model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        """Run one micro-batch: its scores [2, n] and the function that makes a loss of them."""
        batch = PackedBatch.from_rows(next(data_iterator)).to(f"cuda:{torch.cuda.current_device()}")
        if model.training:
            whole = unwrap_model(model)
            untrained = whole.pre_process and not self.embedding_has_gradient()
            self.reduction.before_forward(model, self.bp_steps,
                                          whole.embedding.word_embeddings.weight if untrained else None)
        scores = model(batch=batch, bp_steps=self.bp_steps if model.training else None)
        return scores, partial(self.loss, batch, model.training)

    def loss(self, batch: PackedBatch, training: bool,
             scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Report]:
        """Reduce scores to (sum of losses, count of labels, report) for Megatron's per-token loss."""
        loss, count, report = loss_sums(batch, scores)
        if training:
            report["bp steps"] = scores.new_tensor([self.bp_steps, 1])
            report["tokens per second"] = scores.new_tensor(self.meter.lap(batch.tokens.numel()))
        else:
            self.meter.restart()
        return loss, count, report
