"""A pipelined step in two calls of Megatron's interleaved schedule, where that waits less.

First the leading ticks without gradient, forward only, for all micro-batches; then 1F1B over the other ticks. In
between the last stage hands the states to the first, which keeps two tensors for each micro-batch; where these are too
many, a step is cut into windows of micro-batches, each with both phases.
"""
from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import forward_backward_pipelining_with_interleaving
from megatron.core.utils import get_model_config
from megatron.training import training as megatron_training

from hrm_megatron.parallel.patching import temporarily
from hrm_megatron.parallel.simulate import second_phase
from hrm_megatron.parallel.stages import microbatch_group, microbatch_windows
from hrm_megatron.training.step import TrainingStep


def install_schedule(args: argparse.Namespace, step: TrainingStep) -> None:
    """Let Megatron's loop run its steps by `two_phase_schedule` if there is a pipeline."""
    if args.pipeline_model_parallel_size > 1:
        megatron_training.get_forward_backward_func = lambda **_: two_phase_schedule(
            args.pipeline_schedule, args.pipeline_window, step)


def two_phase_schedule(schedule: str, window: int | None, step: TrainingStep) -> Callable[..., Any]:
    """Make a function with the interface of Megatron's schedules; it may cut a step into windows of micro-batches."""
    chosen: dict[tuple[int, int], int] = {}  # by bp_steps and micro-batches

    def run(*, model: list[torch.nn.Module], data_iterator: list[Iterator[Any]], forward_step_func: Callable[..., Any],
            num_microbatches: int, forward_only: bool, **options: Any) -> Any:
        stage, config = step.stage, get_model_config(model[0])
        stages = config.pipeline_model_parallel_size
        key = step.bp_steps, num_microbatches
        if key not in chosen:
            chosen[key] = second_phase(schedule, step.with_grad, num_microbatches, stages, window)
        stage.second_phase = prefix = 0 if forward_only else chosen[key]

        def phase(part: slice, microbatches: int, **changes: Any) -> Any:
            with temporarily(config, microbatch_group_size_per_vp_stage=microbatch_group(microbatches, stages)):
                return forward_backward_pipelining_with_interleaving(**{
                    **options, "model": model[part], "data_iterator": data_iterator[part],
                    "forward_step_func": forward_step_func, "num_microbatches": microbatches,
                    "forward_only": forward_only, **changes})
        if not prefix:
            return phase(slice(None), num_microbatches)

        def without_loss(*arguments: Any) -> tuple[torch.Tensor, Callable[..., torch.Tensor]]:
            return forward_step_func(*arguments)[0], lambda state, non_loss_data: state

        def both_phases(microbatches: int, begins: bool) -> Any:
            # Here and not with its first micro-batch: a forward-only phase counts no gradients.
            step.prepare_reduction(model[0], stage)
            with _parts_of(config, prefix), torch.no_grad():
                # Later windows must not have FP8 weights cast again (MegatronModule.set_is_first_microbatch).
                states = phase(slice(prefix), microbatches, forward_step_func=without_loss, forward_only=True,
                               collect_non_loss_data=True, first_val_step=begins)
            stage.handed.extend(_hand_over(states, stage.parked[prefix - 1]))
            with _parts_of(config, len(model) - prefix):
                return phase(slice(prefix, None), microbatches)

        *earlier, last = (len(part) for part in microbatch_windows(num_microbatches, stages, window))
        reports: list[Any] = []
        labels: list[torch.Tensor] = []
        with _without_reduction(config, labels):
            for number, microbatches in enumerate(earlier):
                reports += both_phases(microbatches, not number)
        with _finalizing(config, model, labels):
            return reports + both_phases(last, not earlier)
    return run


def _parts_of(config: Any, chunks: int) -> AbstractContextManager[None]:
    """Show the schedule so many chunks; what concerns the weights, all in chunk 0, is not begun by it."""
    return temporarily(config, virtual_pipeline_model_parallel_size=chunks, grad_sync_func=None, param_sync_func=None)


@contextmanager
def _without_reduction(config: Any, labels: list[torch.Tensor]) -> Iterator[None]:
    """Let gradients add up on this rank, and note how many labels they are of."""
    stock = config.no_sync_func
    with ExitStack() as stack:
        for no_sync in stock if isinstance(stock, list) else [stock] if stock else []:
            stack.enter_context(no_sync())
        with temporarily(config, no_sync_func=nullcontext,
                         finalize_model_grads_func=lambda _, count, **__: labels.append(count)):
            yield


def _finalizing(config: Any, model: list[torch.nn.Module], labels: list[torch.Tensor]) -> AbstractContextManager[None]:
    """Let the gradients of all chunks be finalized, over the labels of earlier windows too."""
    stock = config.finalize_model_grads_func
    return temporarily(config, finalize_model_grads_func=lambda _, count, **options: stock(
        model, sum(labels, count), **options))


def _hand_over(states: Sequence[torch.Tensor],
               parked: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> list[torch.Tensor]:
    """Send the last stage's states to the first stage, which has parked a pair for each; others get none."""
    first, last = (rank() for rank in (parallel_state.get_pipeline_model_parallel_first_rank,
                                       parallel_state.get_pipeline_model_parallel_last_rank))
    rank = torch.distributed.get_rank()
    if rank == last:
        torch.distributed.send(torch.stack(list(states)), first)
    if rank != first:
        return []
    buffer = torch.empty(len(parked), *parked[0][0].shape, dtype=parked[0][0].dtype, device=parked[0][0].device)
    torch.distributed.recv(buffer, last)
    return list(buffer.unbind())
