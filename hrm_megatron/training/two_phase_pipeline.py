"""A pipelined step in two calls of Megatron's interleaved schedule, where that waits less.

First the leading ticks without gradient, forward only, for all micro-batches; then 1F1B over the other ticks. The last
stage hands the states to the first, which keeps one or two for each micro-batch (`states_between`); where these are
too many, a step is cut into windows of micro-batches, each with both phases.
"""
from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel.schedules import forward_backward_pipelining_with_interleaving
from megatron.core.utils import get_model_config
from megatron.training import training as megatron_training

from hrm_megatron.parallel.patching import temporarily
from hrm_megatron.parallel.simulate import interleaved, second_phase
from hrm_megatron.parallel.stages import microbatch_group, microbatch_windows
from hrm_megatron.training.step import TrainingStep


def install_schedule(args: argparse.Namespace, step: TrainingStep) -> None:
    """Let Megatron's loop run its steps by `two_phase_schedule` if there is a pipeline of several
    ticks; one tick is what the stock 1F1B schedule runs."""
    if args.pipeline_model_parallel_size > 1 and args.virtual_pipeline_model_parallel_size:
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

        def both_phases(microbatches: int, begins: bool) -> Any:
            # Here and not with its first micro-batch: a forward-only phase counts no gradients.
            step.prepare_reduction(model[0], stage)
            hand_over = HandOver(microbatches, prefix, stages, stage.handed)

            def without_loss(*arguments: Any) -> tuple[torch.Tensor, Callable[..., None]]:
                out = forward_step_func(*arguments)[0]
                hand_over.visited(out)
                return out, lambda state, non_loss_data: None
            with _parts_of(config, prefix), torch.no_grad():
                # Later windows must not have FP8 weights cast again (MegatronModule.set_is_first_microbatch).
                phase(slice(prefix), microbatches, forward_step_func=without_loss, forward_only=True,
                      collect_non_loss_data=True, first_val_step=begins)
            hand_over.finish()
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


class HandOver:
    """States on their way from the last stage to the first, each by itself, as soon as it is there.

    The last stage sends message j behind its visit v, the first posts the receive behind its own visit v + stages - 1,
    both without waiting. Nothing waits for ever, even where one of NCCL's kernels that waits holds up all that are
    launched behind it. (1) For its visit v + stages - 1 the first stage needs that stage s has launched its messages
    behind visit v + stages - 2 - s, which send that visit on and receive the next: of the last stage, those behind
    visit v - 1. What came back to the first from there is older still, since a group has at least `stages` micro-
    batches. So the first posts receive j whatever message j holds up on the last stage. (2) Visit v of the last stage
    needs visit v of the first, which stands before receive j: so the last sends message j whatever that receive
    holds up. The second phase takes states in the order of the messages.

    They have a communicator of their own, Megatron's for tied embeddings, which an HRM has none of: on the schedule's
    they would have to be in one order with its messages, which depends on the size of a group.
    """

    def __init__(self, microbatches: int, ticks: int, stages: int, arrivals: deque[Callable[[], torch.Tensor]]) -> None:
        visits = interleaved(range(microbatches), range(ticks), 0, stages)
        self.is_last_tick = [visit.tick == ticks - 1 for visit in visits if not visit.backward]
        self.stages, self.arrivals, self.visits, self.posted = stages, arrivals, 0, 0
        self.sent: deque[tuple[torch.Tensor, Any]] = deque()
        self.first, self.last = (rank() for rank in (parallel_state.get_pipeline_model_parallel_first_rank,
                                                     parallel_state.get_pipeline_model_parallel_last_rank))
        self.rank = torch.distributed.get_rank()

    def visited(self, out: torch.Tensor) -> None:
        """Take the result [s/tp under SP, b, h] of this stage's next visit in the first phase."""
        self.visits += 1
        self.empty = partial(torch.empty, out.shape, dtype=out.dtype, device=out.device)
        if self.rank == self.last and self.is_last_tick[self.visits - 1]:
            self._wait(self.stages - 1)
            state = out.detach().contiguous()  # the schedule may empty `out` itself
            self.sent.append((state, torch.distributed.isend(state, self.first, parallel_state.get_embedding_group())))
        if self.rank == self.first:
            self._receive(self.visits - self.stages + 1)

    def finish(self) -> None:
        """Post what is left to be received, or see the last states off."""
        if self.rank == self.first:
            self._receive(len(self.is_last_tick))
        self._wait(0)

    def _receive(self, visits: int) -> None:
        """Post the receives of states that the last stage's first `visits` visits end with."""
        while self.posted < visits:
            if self.is_last_tick[self.posted]:
                state = self.empty()
                work = torch.distributed.irecv(state, self.last, parallel_state.get_embedding_group())
                self.arrivals.append(partial(_arrived, state, work))
            self.posted += 1

    def _wait(self, most: int) -> None:
        """Let at most so many states of this stage be on their way."""
        while len(self.sent) > most:
            self.sent.popleft()[1].wait()


def _arrived(state: torch.Tensor, work: Any) -> torch.Tensor:
    work.wait()
    return state
