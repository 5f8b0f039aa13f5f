"""A pipelined step as two calls of Megatron's interleaved schedule, used where that has a smaller bubble.

The first phase runs the leading ticks without gradient, forward only, for all micro-batches; the second runs 1F1B over
the other ticks. The last stage sends the states to the first, which keeps one or two per micro-batch
(`states_between`); to bound their memory, a step can be cut into windows of micro-batches, each with both phases.
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
    """Let Megatron's loop use `two_phase_schedule` in a pipeline with several ticks; for a single tick the stock 1F1B
    schedule is right."""
    if args.pipeline_model_parallel_size > 1 and args.virtual_pipeline_model_parallel_size:
        megatron_training.get_forward_backward_func = lambda **_: two_phase_schedule(
            args.pipeline_schedule, args.pipeline_window, step)


def two_phase_schedule(schedule: str, window: int | None, step: TrainingStep) -> Callable[..., Any]:
    """Return a function with the interface of Megatron's schedules; it may cut a step into windows of micro-batches."""
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
            # Here rather than at its first micro-batch: in a forward-only phase DDP expects no gradients.
            step.prepare_reduction(model[0], stage)
            hand_over = HandOver(microbatches, prefix, stages, stage.handed)

            def without_loss(*arguments: Any) -> tuple[torch.Tensor, Callable[..., None]]:
                out = forward_step_func(*arguments)[0]
                hand_over.visited(out)
                return out, lambda state, non_loss_data: None
            with _parts_of(config, prefix), torch.no_grad():
                # Later windows must not cast FP8 weights again (MegatronModule.set_is_first_microbatch).
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
    """Let the schedule see `chunks` chunks and start no parameter or gradient sync: all weights are in chunk 0."""
    return temporarily(config, virtual_pipeline_model_parallel_size=chunks, grad_sync_func=None, param_sync_func=None)


@contextmanager
def _without_reduction(config: Any, labels: list[torch.Tensor]) -> Iterator[None]:
    """Accumulate gradients on this rank without reduction, and record the number of their labels."""
    stock = config.no_sync_func
    with ExitStack() as stack:
        for no_sync in stock if isinstance(stock, list) else [stock] if stock else []:
            stack.enter_context(no_sync())
        with temporarily(config, no_sync_func=nullcontext,
                         finalize_model_grads_func=lambda _, count, **__: labels.append(count)):
            yield


def _finalizing(config: Any, model: list[torch.nn.Module], labels: list[torch.Tensor]) -> AbstractContextManager[None]:
    """Finalize the gradients of all chunks, divided by the labels of all windows."""
    stock = config.finalize_model_grads_func
    return temporarily(config, finalize_model_grads_func=lambda _, count, **options: stock(
        model, sum(labels, count), **options))


class HandOver:
    """Sends the states from the last stage to the first, each in its own message as soon as it is computed.

    The last stage sends message j after its visit v; the first stage posts the receive after its own visit
    v + stages - 1; neither waits. There is no deadlock, even if a waiting NCCL kernel blocks all kernels launched after
    it. (1) For its visit v + stages - 1 the first stage needs stage s to have launched its messages after visit
    v + stages - 2 - s, which send that visit on and receive the next; for the last stage, those after visit v - 1.
    Whatever the schedule returns from there to the first stage is older still, since a group has at least `stages`
    micro-batches. So the first stage posts receive j even if message j blocks the last stage. (2) Visit v of the last
    stage needs visit v of the first stage, which precedes receive j. So the last stage sends message j even if that
    receive blocks the first stage. The second phase takes states in the order of the messages.

    The messages have their own communicator, Megatron's embedding group, which an HRM does not use (no tied
    embeddings). On the schedule's communicator they would have to be ordered with its messages, and that order depends
    on the size of a group.
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
        """Handle the output [s/tp under SP, b, h] of this stage's next visit in the first phase."""
        self.visits += 1
        self.empty = partial(torch.empty, out.shape, dtype=out.dtype, device=out.device)
        if self.rank == self.last and self.is_last_tick[self.visits - 1]:
            self._wait(self.stages - 1)
            state = out.detach().contiguous()  # the schedule may free the data of `out`
            self.sent.append((state, torch.distributed.isend(state, self.first, parallel_state.get_embedding_group())))
        if self.rank == self.first:
            self._receive(self.visits - self.stages + 1)

    def finish(self) -> None:
        """Post the remaining receives, and wait for the remaining sends."""
        if self.rank == self.first:
            self._receive(len(self.is_last_tick))
        self._wait(0)

    def _receive(self, visits: int) -> None:
        """Post the receives of all states that the last stage computes in its first `visits` visits."""
        while self.posted < visits:
            if self.is_last_tick[self.posted]:
                state = self.empty()
                work = torch.distributed.irecv(state, self.last, parallel_state.get_embedding_group())
                self.arrivals.append(partial(_arrived, state, work))
            self.posted += 1

    def _wait(self, most: int) -> None:
        """Wait until at most `most` sends of this stage are in flight."""
        while len(self.sent) > most:
            self.sent.popleft()[1].wait()


def _arrived(state: torch.Tensor, work: Any) -> torch.Tensor:
    work.wait()
    return state
