"""The functions of one training step, between Megatron's schedule and the model."""
from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from typing import Any

import torch
from megatron.core import parallel_state

from hrm_megatron.attention.balance import balanced_order
from hrm_megatron.attention.prefix_lm import PrefixSequences
from hrm_megatron.data.batch import PackedBatch
from hrm_megatron.model.hrm import HRMModel
from hrm_megatron.model.lora import adapt
from hrm_megatron.model.pipeline import PipelinedHRM, TickChunk
from hrm_megatron.model.ticks import Tick, ticks_of, trains_embedding
from hrm_megatron.optim.schedule import BPSchedule
from hrm_megatron.parallel.context import context_positions
from hrm_megatron.training.arguments import model_config
from hrm_megatron.training.fsdp import FP32Module
from hrm_megatron.training.lora import lora_of
from hrm_megatron.training.metrics import SPEED, Report, ThroughputMeter, filled, loss_sums
from hrm_megatron.training.overlap import OverlappedReduction
from hrm_megatron.training.step_schedules import bp_schedule
from hrm_megatron.transformer_config import architecture_of


def innermost(model: torch.nn.Module) -> Any:
    """Return the model inside all of Megatron's wrappers (its `unwrap_model` leaves some of Megatron-FSDP's)."""
    while isinstance(inner := getattr(model, "module", None), torch.nn.Module):
        model = inner
    return model


class TrainingStep:
    """The functions that Megatron's loop calls, bound to the arguments of the run.

    `loads`: Megatron will load a checkpoint into the model that is built here.
    """

    def __init__(self, args: argparse.Namespace, loads: bool = False) -> None:
        self.args, self.loads = args, loads
        self.meter = ThroughputMeter(args.data_parallel_size * args.context_parallel_size)
        self.reduction = OverlappedReduction()
        self.stage: PipelinedHRM
        self.on_losses: Callable[[PackedBatch, torch.Tensor], None] | None = None  # gets a micro-batch's losses [n]
        self.waiting: list[deque[tuple[PackedBatch, PrefixSequences]]] = []

    def build_model(self, pre_process: bool = True, post_process: bool = True, vp_stage: int | None = None,
                    config: Any = None, pg_collection: Any = None) -> HRMModel | FP32Module | TickChunk:
        """Return this rank's model, or in a pipeline one of its chunks (Megatron's `model_provider`)."""
        config = config or model_config(self.args)
        stages = pg_collection.pp if pg_collection else None
        if vp_stage is None and self.args.pipeline_model_parallel_size == 1:
            model = HRMModel(config, self.seed, pre_process, post_process, pg_collection=pg_collection)
            self.adapt(model)
            return FP32Module(model) if self.args.use_megatron_fsdp and not self.args.bf16 else model
        if vp_stage:
            return TickChunk(self.stage, vp_stage)
        assert stages is not None
        self.stage = PipelinedHRM(config, self.seed, stages.rank() == 0, stages.rank() == stages.size() - 1,
                                  pg_collection=pg_collection)
        self.adapt(self.stage)
        self.waiting = [deque() for _ in range(self.stage.num_ticks)]
        return self.stage

    @property
    def seed(self) -> int | None:
        """Seed of the initial weights; None if a checkpoint will overwrite all of them."""
        args = self.args
        # Masters of FP8 weights start from the initial weights, and Megatron-FSDP accepts checkpoints with gaps.
        draws = not self.loads or args.fp8_param_gather or args.fp4_param_gather or args.use_megatron_fsdp
        return int(args.seed) if draws else None

    def adapt(self, model: HRMModel) -> None:
        """Add LoRA adapters to the layers if `--lora-rank` is given."""
        if lora := lora_of(self.args):
            adapt(model, lora, self.args.seed)

    @cached_property
    def bp_schedule(self) -> BPSchedule:
        """Schedule of gradient ticks; first read in the first step, because a checkpoint may decide it
        (training/resume.py)."""
        return bp_schedule(self.args)

    def running_step(self) -> int:
        """Return the number of the current step, counted from 1; Megatron counts from 0, and only within its loop."""
        return int(getattr(self.args, "curr_iteration", 0)) + 1

    @property
    def bp_steps(self) -> int:
        """Number of gradient ticks of the current step."""
        return self.bp_schedule.at(self.running_step())

    @property
    def ticks(self) -> list[Tick]:
        """The ticks of the current step."""
        return ticks_of(architecture_of(self.args, self.args.vocab_size), self.bp_steps)

    @property
    def with_grad(self) -> list[bool]:
        """Which ticks of the current step build a graph."""
        return [tick.with_grad for tick in self.ticks]

    def embedding_has_gradient(self) -> bool:
        """Tell whether the graph of the current step reaches the embedding."""
        return trains_embedding(self.ticks)

    def forward(self, data_iterator: Iterator[dict[str, torch.Tensor]],
                model: torch.nn.Module) -> tuple[torch.Tensor, Any]:
        """Run one micro-batch through the model or a chunk; return its output, and the function that reduces scores
        [2, n] to a loss."""
        part = innermost(model)
        batch, sequences = self.micro_batch(data_iterator, part)
        if model.training and isinstance(part, HRMModel) and not getattr(part, "second_phase", 0):
            self.prepare_reduction(model, part)
        out = model(batch=batch, bp_steps=self.bp_steps if model.training else None, sequences=sequences)
        return out, partial(self.loss, batch, model.training)

    def prepare_reduction(self, model: torch.nn.Module, part: HRMModel) -> None:
        """Tell DDP which gradients to expect from a micro-batch; `part` is the model inside `model`."""
        embedding = part.embedding.word_embeddings.weight if part.pre_process else None
        untrained = embedding is not None and embedding.requires_grad and not self.embedding_has_gradient()
        if isinstance(part, PipelinedHRM) and not part.second_phase:
            untrained = False  # it does get a gradient, which is zero
        self.reduction.before_forward(model, self.bp_steps, embedding if untrained else None)

    def micro_batch(self, data_iterator: Iterator[dict[str, torch.Tensor]],
                    part: HRMModel | TickChunk) -> tuple[PackedBatch, PrefixSequences]:
        """Return the next micro-batch; in a pipeline chunk 0 reads it and queues it for the chunks of later ticks."""
        if isinstance(part, TickChunk):
            return self.waiting[part.index].popleft()
        batch = PackedBatch.from_rows(next(data_iterator))
        context = part.pg_collection.cp
        if context.size() > 1:
            batch = batch.in_order([balanced_order(pairs, batch.row_tokens, context.size()) for pairs in batch.lengths])
            batch = batch.on_context_rank(context_positions(batch.row_tokens, context.rank(), context.size()))
        batch = batch.to(f"cuda:{torch.cuda.current_device()}")
        read = batch, part.sequences(batch)
        for queue in self.waiting[1:]:
            queue.append(read)
        return read

    def loss(self, batch: PackedBatch, training: bool,
             scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Report]:
        """Reduce scores to (sum of losses, count of labels, report) for Megatron's per-token loss."""
        group = parallel_state.get_context_parallel_group() if self.args.context_parallel_size > 1 else None
        loss, count, report = loss_sums(batch, scores, group)
        if training:
            if self.on_losses:
                self.on_losses(batch, scores[0].detach())
            for name, pair in (("bp steps", (self.bp_steps, 1)),
                               (SPEED, self.meter.lap(batch.tokens.numel()))):
                report[name] = torch.stack([filled(scores, value) for value in pair])
        return loss, count, report
