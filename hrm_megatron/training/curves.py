"""`--log-hrm-norms`: write norms that show whether the recurrence drifts to TensorBoard.

Norms are computed in hooks, only in steps that write to TensorBoard anyway and therefore synchronize with the device;
in other steps the hooks cost one integer comparison per chunk of the model.
"""
from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.training import training as megatron_training

from hrm_megatron.model.hrm import STACKS, HRMModel
from hrm_megatron.model.ticks import Tick
from hrm_megatron.optim.sizes import sizes
from hrm_megatron.parallel.patching import around
from hrm_megatron.training.scalars import write_scalars, writes
from hrm_megatron.training.step import TrainingStep, innermost

STATE, RESIDUAL = KINDS = ("state RMS", "residual RMS")


class TickNorms:
    """Sums of squares of the stacks' outputs, by tick, over the micro-batches of a step.

    STATE is the output, which the next tick reads. RESIDUAL is the residual stream before the stack's final norm: with
    pre-norm it may grow, while after that norm the RMS is 1. Post-norm stacks have no final norm.
    """

    def __init__(self, measured: Callable[[], bool]) -> None:
        self.measured = measured  # whether the current step is measured
        self.tick: int | None = None  # the running tick; None: nothing is measured
        self.found: dict[tuple[str, int], tuple[torch.Tensor, int]] = {}  # sum of squares, elements

    def attach(self, part: torch.nn.Module) -> None:
        """Add hooks to a model, or to a chunk of the last pipeline stage, where states are complete."""
        part.register_forward_pre_hook(self._begin)
        part.register_forward_hook(self._end)
        if isinstance(part, HRMModel):
            for name in STACKS.values():
                if (stack := getattr(part, name, None)) is not None:
                    stack.register_forward_hook(self._left)
                    if stack.final_layernorm is not None:
                        stack.final_layernorm.register_forward_pre_hook(self._before_norm)

    def _begin(self, part: Any, _: Any) -> None:
        if part.training and self.measured():
            self.tick = getattr(part, "index", 0)

    def _end(self, *_: Any) -> None:
        self.tick = None  # also during backward, where stacks may be recomputed

    def _left(self, stack: torch.nn.Module, inputs: Any, out: torch.Tensor) -> None:
        if self.tick is not None:
            self._add(STATE, out)
            self.tick += 1

    def _before_norm(self, norm: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if self.tick is not None:
            self._add(RESIDUAL, inputs[0])

    def _add(self, kind: str, x: torch.Tensor) -> None:
        assert self.tick is not None
        square = torch.linalg.vector_norm(x.detach(), dtype=torch.float32).double().square()
        before, count = self.found.get((kind, self.tick), (0, 0))
        self.found[kind, self.tick] = before + square, count + x.numel()

    def take(self, ticks: Sequence[Tick], groups: Sequence[Any]) -> dict[str, float]:
        """Return the RMS over all ranks of `groups` by curve name, and reset."""
        found, self.found = sorted(self.found.items()), {}
        if not found:
            return {}
        sums = torch.stack([torch.stack((square, torch.full_like(square, count))) for _, (square, count) in found])
        for group in groups:
            torch.distributed.all_reduce(sums, group=group)
        return {f"{kind}/tick {tick + 1} z_{ticks[tick].writes}": math.sqrt(square / count)
                for ((kind, tick), _), (square, count) in zip(found, sums.tolist(), strict=True)}


class Curves:
    """Computes the norms of a step and writes them."""

    def __init__(self, args: argparse.Namespace, step: TrainingStep) -> None:
        self.args, self.running = args, step
        self.norms = TickNorms(lambda: writes(args, step.running_step()))
        self.optimizer: Any = None

    def get_megatron_optimizer(self, stock: Callable[..., Any], config: Any, chunks: list[Any], **options: Any) -> Any:
        """Add hooks to the model when its optimizer is built: the first point at which both exist."""
        if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
            for chunk in chunks:
                self.norms.attach(innermost(chunk))
        self.optimizer = stock(config, chunks, **options)
        return self.optimizer

    def training_log(self, stock: Callable[..., bool], losses: dict[str, torch.Tensor], totals: dict[str, Any],
                     lr: float | None, iteration: int, loss_scale: float, report_memory: bool, skipped: int,
                     *rest: Any, **options: Any) -> bool:
        report_memory = stock(losses, totals, lr, iteration, loss_scale, report_memory, skipped, *rest, **options)
        if writes(self.args, iteration):
            found = self.norms.take(self.running.ticks, self.groups())
            if not skipped:
                found |= self.step_sizes()
            write_scalars(found, iteration)
        return report_memory

    def groups(self) -> list[Any]:
        """Return the groups over which a state is sharded: rows over DP, positions over CP and, with sequence parallel,
        over TP."""
        shards = [parallel_state.get_data_parallel_group(with_context_parallel=True)]
        return shards + [parallel_state.get_tensor_model_parallel_group()] * self.args.sequence_parallel

    def step_sizes(self) -> dict[str, float]:
        """Return norms of the update that the optimizer has just applied."""
        found = sizes(self.optimizer, parallel_state.get_tensor_model_parallel_group())
        update, weights, distance = (found[name] for name in ("update", "weights", "EMA distance"))
        return {"update/norm": update, "update/relative to weights": update / weights,
                "EMA/relative distance": distance / weights}


def install_curves(args: argparse.Namespace, step: TrainingStep) -> None:
    """Let Megatron's loop write the norms. Install it before what may end a run at a step, so that this step is
    written too."""
    if not args.log_hrm_norms:
        return
    curves = Curves(args, step)
    megatron_training.get_megatron_optimizer = around(megatron_training.get_megatron_optimizer,
                                                      curves.get_megatron_optimizer)
    megatron_training.training_log = around(megatron_training.training_log, curves.training_log)
