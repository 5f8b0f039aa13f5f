"""Pipeline parallelism of a recurrence: a stage owns some layers of both stacks, and every tick is a virtual chunk of
Megatron's unmodified interleaved schedule. All chunks of a stage share its weights.

One tensor, the newest state [s/tp under SP, b, h], is sent from stage to stage and from the last stage back to the
first. The first stage parks the other state, which the tick does not replace, until the newest one returns. Chunk 0 is
the stage's `PipelinedHRM` and owns all its weights; the others are `TickChunk`s, which own none, so their DDP has no
parameters.
"""
from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule

from hrm_megatron.attention.prefix_lm import PrefixSequences
from hrm_megatron.data.batch import PackedBatch
from hrm_megatron.model.hrm import HRMModel
from hrm_megatron.model.recurrence import Stack, summed
from hrm_megatron.model.ticks import Tick, ticks_of
from hrm_megatron.transformer_config import HRMConfig


class NoGradTick(torch.autograd.Function):
    """Run a stack without a graph. Backward returns zeros: without them the previous stage would wait forever."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, stack: Stack) -> torch.Tensor:
        # Detached: stock layers turn gradients on again for their residual sum (bias_dropout_add_exec_handler).
        return stack(x.detach())

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return torch.zeros_like(grads[0]), None


class Enter(torch.autograd.Function):
    """Return `x` as the input of the first tick; backward adds the gradients that later ticks left on its detached copy
    `parked`.

    Those backwards have already run: the schedule visits a micro-batch's chunks in reverse.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, parked: torch.Tensor) -> torch.Tensor:
        ctx.parked = parked
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        later = ctx.parked.grad
        return grads[0] if later is None else grads[0] + later, None


class PipelinedHRM(HRMModel):
    """One pipeline stage, and the chunk of tick 0."""

    def __init__(self, config: HRMConfig, seed: int | None, first_stage: bool, last_stage: bool,
                 pg_collection: Any = None) -> None:
        super().__init__(config, seed, pre_process=first_stage, post_process=last_stage, pg_collection=pg_collection)
        self.first_stage, self.last_stage = first_stage, last_stage
        self.num_ticks = len(ticks_of(config.arch))
        self.parked: list[deque[torch.Tensor | None]] = [deque() for _ in range(self.num_ticks)]
        # If the step has two phases: the first tick of the second, and callables that return the states the first ended
        # with.
        self.second_phase, self.handed = 0, deque[Callable[[], torch.Tensor]]()
        # Megatron reads `post_process` per chunk, not per stage.
        self.post_process = last_stage and self.num_ticks == 1

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Take the state received from the previous stage (or from the last one)."""
        self.received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(self, batch: PackedBatch, bp_steps: int | None = None,
                sequences: PrefixSequences | None = None) -> torch.Tensor:
        """Run this stage's layers of tick 0: [s/tp under SP, b, h], or scores [2, n] if it is the last of all."""
        received, self.received = self.received, None  # free it now, not at the next call
        return self.run_tick(0, received, batch, bp_steps, sequences)

    def run_tick(self, index: int, received: torch.Tensor | None, batch: PackedBatch, bp_steps: int | None,
                 sequences: PrefixSequences | None) -> torch.Tensor:
        """Run this stage's layers of one tick; the last stage turns the last tick into scores [2, n]."""
        ticks = self.ticks(bp_steps)
        tick = ticks[index]
        x = self._enter(ticks, index, received, batch) if self.first_stage else received
        assert x is not None
        if tick.with_grad and (self.config.recompute_granularity or tick.recompute) and not x.requires_grad:
            x.requires_grad_(torch.is_grad_enabled())  # else reentrant recompute gives the weights no gradient
        stack = self.stack_of(sequences, tick)
        out: torch.Tensor = stack(x) if tick.with_grad else NoGradTick.apply(x, stack)
        return self.scores(out, batch) if self.last_stage and index == self.num_ticks - 1 else out

    def _enter(self, ticks: list[Tick], index: int, received: torch.Tensor | None, batch: PackedBatch) -> torch.Tensor:
        """Return the input of a tick, and park the state that it does not replace for the next tick."""
        replaced = "".join(tick.writes for tick in ticks)
        begins = index in (0, self.second_phase)  # no earlier tick is in this graph
        z_h = z_l = None
        if index:
            kept = self.parked[index - 1].popleft()
            if begins:
                received, kept = self.handed.popleft()(), None if kept is None else kept.detach()
            # `received` is a leaf: later ticks add to its .grad, which the schedule sends back after this chunk's
            # backward.
            z_h, z_l = (received, kept) if replaced[index - 1] == "H" else (kept, received)
        entering = z_h
        if begins and "H" not in replaced[:index]:  # z_H is still the embedding
            embedded = self.embed(batch)
            z_h = embedded.detach().requires_grad_(torch.is_grad_enabled())
            z_l = self.first_z_l(embedded) if z_l is None else z_l
            entering = Enter.apply(embedded, z_h)
        if index < self.num_ticks - 1:
            embedded_again = index + 1 == self.second_phase and "H" not in replaced[:index + 1]
            self.parked[index].append(None if embedded_again else z_l if replaced[index] == "H" else z_h)
        states = {name: state for name, state in (("H", entering), ("L", z_l)) if state is not None}
        return summed(states, ticks[index].reads)


class TickChunk(MegatronModule):  # type: ignore[misc]
    """The chunk of a later tick: runs the stage's layers and owns no weights."""

    def __init__(self, stage: PipelinedHRM, index: int) -> None:
        super().__init__(stage.config)
        object.__setattr__(self, "stage", stage)  # not registered as a submodule, so it adds no parameters
        self.index = index
        self.pre_process = False
        self.post_process = stage.last_stage and index == stage.num_ticks - 1
        self.share_embeddings_and_output_weights = False
        self.pg_collection = stage.pg_collection
        self.received: torch.Tensor | None = None

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Take the state received from the previous stage (or from the last one)."""
        self.received = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(self, batch: PackedBatch, bp_steps: int | None = None,
                sequences: PrefixSequences | None = None) -> torch.Tensor:
        """Run this stage's layers of the tick: [s/tp under SP, b, h], or scores [2, n] if it is the last of all."""
        received, self.received = self.received, None
        return self.stage.run_tick(self.index, received, batch, bp_steps, sequences)

    def sharded_state_dict(self, *_: Any, **__: Any) -> dict[str, Any]:
        """Store nothing: chunk 0 stores the stage's weights."""
        return {}
