"""Simulate a pipeline schedule of the recurrence: bubble and number of live graphs, without running anything.

Every stage runs a fixed list of operations in order, as in Megatron-Core; an operation starts when the stage is free
and its input has arrived. A tick's forward takes 1; its backward takes 2, or 0 for a tick without gradient, which still
sends zeros to the previous stage. A message takes `LATENCY`. Head, embedding, optimizer and data parallel reduction are
ignored.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hrm_megatron.parallel.stages import microbatch_group, microbatch_windows

AUTO, STOCK, TWO_PHASE = SCHEDULES = ("auto", "stock", "two-phase")  # `--pipeline-schedule`
BACKWARD, LATENCY = 2.0, 0.05  # in forwards of a tick


class Operation(NamedTuple):
    """Forward or backward of one tick of one micro-batch on one stage."""

    backward: bool
    microbatch: int
    tick: int


@dataclass(frozen=True)
class Estimate:
    """`bubble`: fraction of time in which a stage waits; `live_graphs`: maximum over stages of ticks whose forward has
    run but whose backward has not; `timelines[stage]`: its operations as (operation, start, end)."""

    bubble: float
    live_graphs: int
    timelines: list[list[tuple[Operation, float, float]]]


def interleaved(microbatches: range, ticks: range, stage: int, stages: int) -> list[Operation]:
    """List the operations of one stage in Megatron's interleaved schedule with one virtual chunk per tick.

    Source: core/pipeline_parallel/schedules.py, get_schedule_table and get_pp_rank_microbatches.
    """
    group = microbatch_group(len(microbatches), stages)
    visits = [(m, tick) for start in range(0, len(microbatches), group) for tick in ticks
              for m in microbatches[start:start + group]]
    forward = [Operation(False, m, tick) for m, tick in visits]
    backward = [Operation(True, m, ticks[0] + ticks[-1] - tick) for m, tick in visits]
    warmup = min(len(forward), 2 * (stages - stage - 1) + (len(ticks) - 1) * group)
    steady = [operation for pair in zip(forward[warmup:], backward, strict=False) for operation in pair]
    return forward[:warmup] + steady + backward[len(forward) - warmup:]


def estimate(orders: Sequence[Sequence[Operation]], with_grad: Sequence[bool]) -> Estimate:
    """Simulate the operations of all stages; `with_grad[tick]` tells whether a tick builds a graph."""
    stages, last = len(orders), len(with_grad) - 1
    done: dict[tuple[Operation, int], float] = {}
    microbatches = 1 + max(operation.microbatch for operation in orders[0])
    timelines: list[list[tuple[Operation, float, float]]] = [[] for _ in orders]
    clock, position, live, most = [0.0] * stages, [0] * stages, [0] * stages, 0
    while any(position[stage] < len(orders[stage]) for stage in range(stages)):
        before = sum(position)
        for stage, order in enumerate(orders):
            while position[stage] < len(order):
                operation = order[position[stage]]
                source = _source(operation, stage, stages, last)
                if source is not None and source not in done:
                    break
                arrival = 0.0 if source is None else done[source] + LATENCY * (source[1] != stage)
                grad = with_grad[operation.tick]
                cost = BACKWARD * grad if operation.backward else 1.0
                start = max(clock[stage], arrival)
                clock[stage] = done[operation, stage] = start + cost
                timelines[stage].append((operation, start, start + cost))
                live[stage] += grad * (-1 if operation.backward else 1)
                most = max(most, live[stage])
                position[stage] += 1
        assert sum(position) > before, "the schedule waits for itself"
    useful = microbatches * (len(with_grad) + BACKWARD * sum(with_grad))
    return Estimate(1 - useful / max(clock), most, timelines)


def _source(operation: Operation, stage: int, stages: int, last: int) -> tuple[Operation, int] | None:
    """Return the operation, and its stage, whose result this one needs, or None."""
    backward, m, tick = operation
    if not backward:
        if stage:
            return operation, stage - 1
        return (Operation(False, m, tick - 1), stages - 1) if tick else None
    if stage < stages - 1:
        return operation, stage + 1
    return (Operation(False, m, tick), stage) if tick == last else (Operation(True, m, tick + 1), 0)


def stock(microbatches: int, with_grad: Sequence[bool], stages: int) -> Estimate:
    """Estimate Megatron's interleaved schedule over all ticks."""
    ticks = range(len(with_grad))
    return estimate([interleaved(range(microbatches), ticks, stage, stages) for stage in range(stages)], with_grad)


def two_phase_orders(windows: Sequence[range], with_grad: Sequence[bool], stages: int) -> list[list[Operation]]:
    """List the operations of all stages if each window of micro-batches first runs its leading ticks without gradient,
    forward only, and then the others."""
    prefix = leading(with_grad)
    phases = range(prefix), range(prefix, len(with_grad))

    def order(stage: int, window: range) -> list[Operation]:
        first, second = (interleaved(window, ticks, stage, stages) for ticks in phases)
        return [operation for operation in first if not operation.backward] + second
    return [[operation for window in windows for operation in order(stage, window)] for stage in range(stages)]


def two_phase(microbatches: int, with_grad: Sequence[bool], stages: int, window: int | None = None) -> Estimate:
    """Estimate the two-phase schedule, with two phases per window of micro-batches (`window` None: one window).

    All visits of a phase cost the same, so stages wait less for each other if there are many micro-batches.
    """
    windows = microbatch_windows(microbatches, stages, window)
    return estimate(two_phase_orders(windows, with_grad, stages), with_grad)


def leading(with_grad: Sequence[bool]) -> int:
    """Count the ticks before the first one with a gradient."""
    return list(with_grad).index(True)


def second_phase(schedule: str, with_grad: Sequence[bool], microbatches: int, stages: int,
                 window: int | None = None) -> int:
    """Return the first tick of the second phase, or 0 for a single phase: if `schedule` is stock, no leading tick lacks
    a gradient, or two phases have no smaller bubble."""
    prefix = leading(with_grad)
    if schedule == STOCK or not prefix:
        return 0
    if schedule == AUTO and (two_phase(microbatches, with_grad, stages, window).bubble
                             >= stock(microbatches, with_grad, stages).bubble):
        return 0
    return prefix
