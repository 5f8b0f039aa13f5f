"""Effective training time: the share of a run's time in which steps are made that a later failure does not take back.

Failures come at a constant rate for each GPU. After one the run is found dead, starts again, loads the newest complete
checkpoint, and makes again what was made since.
"""
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hrm_megatron.config import Architecture
from hrm_megatron.planner.memory import BF16
from hrm_megatron.planner.search import Plan, Question

SAVED_BYTES = 4 * 4  # of a weight beside itself in a checkpoint: master, both moments and EMA in fp32
GPU_MTTF_HOURS = 8 * 1024.0  # a failure every 8 hours on 1,024 GPUs
# Assumed until measured.
STORAGE_PER_NODE = 1e9  # bytes/s of a shared file system
COPY_PER_GPU = 1e10  # bytes/s from a GPU to its host, for a save that is written behind the training
START_SECONDS, DETECT_SECONDS = 90.0, 120.0

RUNS, MIDDLE = 200, (5, 95)  # simulated, and the percentiles of them that are told
MOST_FAILURES = 1000  # of a simulated run
LEAST_SHARE = 0.01  # of the time, below which no run gets on
MOST_EXPONENT = 700  # of e, in fp64
# Between saves, where stalls cost less than LEAST_SHARE by then: failures of GPUs are not all that a run goes back for.
MOST_SECONDS = 3600
ASYNC = "--async-save --use-persistent-ckpt-worker"
KEPT = 2  # checkpoints: the newest, and one should that be damaged


@dataclass(frozen=True)
class Hazards:
    """Seconds. `mttf` of the whole job; a save stops training for `stall` and is complete `write` after it began;
    a failure is noticed after `detect`, and training goes on `restart` later, start and load together."""

    mttf: float
    stall: float
    write: float
    detect: float
    restart: float

    @property
    def lost(self) -> float:
        """Until training goes on, in which a further failure begins it again."""
        return self.detect + self.restart

    def expected_share(self, interval: float) -> float:
        """Share of the time that is kept when a save comes after each `interval` seconds of steps.

        `interval / (M e^(R/M) (e^((interval + stall)/M) - 1))` of J. Daly, A higher order estimate of the optimum
        checkpoint interval for restart dumps, Future Generation Computer Systems 22 (2006), equation 20: exact where
        training waits for a save. What is written behind it is lost for so much longer, here part of R.
        """
        behind = max(0.0, self.write - self.stall)
        lost, cycle = (self.lost + behind) / self.mttf, (interval + self.stall) / self.mttf
        return interval / (self.mttf * math.exp(lost) * math.expm1(cycle)) if lost + cycle < MOST_EXPONENT else 0.0

    def best_interval(self, step_seconds: float) -> int:
        """Return the steps between saves with the highest expected share; the next save waits for the last, and comes
        each MOST_SECONDS if stalls take no more than LEAST_SHARE of the time by then."""
        least = max(1, math.ceil(self.write / step_seconds))
        most = max(MOST_SECONDS, self.stall / LEAST_SHARE)
        young = math.sqrt(2 * max(self.stall, step_seconds / 100) * self.mttf)
        candidates = {max(least, round(min(most, young * factor) / step_seconds))
                      for factor in np.geomspace(0.05, 5, 400)}
        return max(sorted(candidates), key=lambda steps: self.expected_share(steps * step_seconds))


def simulate(hazards: Hazards, step_seconds: float, interval: int, steps: int, runs: int, seed: int) -> np.ndarray:
    """Return the effective training time of so many runs of `steps`, with a save after each `interval` steps."""
    rng = np.random.default_rng(seed)
    return np.array([steps * step_seconds / _one_run(hazards, step_seconds, interval, steps, rng)
                     for _ in range(runs)])


def _one_run(hazards: Hazards, step_seconds: float, interval: int, steps: int, rng: np.random.Generator) -> float:
    """Seconds of one run."""
    kept, seconds, cycle = 0, 0.0, interval * step_seconds + hazards.stall
    while True:
        rest = steps - kept
        whole = rest * step_seconds + -(-rest // interval) * hazards.stall
        failure = rng.exponential(hazards.mttf)
        if failure >= whole:
            return seconds + whole
        # The n-th save begins n intervals and n - 1 stalls after the start.
        complete = int((failure - max(hazards.write, hazards.stall) + hazards.stall) // cycle)
        kept += max(0, complete) * interval
        seconds += failure + hazards.lost
        while (failure := rng.exponential(hazards.mttf)) < hazards.lost:
            seconds += failure


@dataclass(frozen=True)
class Measured:
    """Seconds that a run has measured, None where it has not."""

    save: float | None = None
    stall: float | None = None  # of a save behind the training
    load: float | None = None
    start: float | None = None
    detect: float | None = None


def checkpoint_bytes(architecture: Architecture) -> int:
    """Bytes of one checkpoint, with weights in bf16."""
    return architecture.num_parameters * (BF16 + SAVED_BYTES)


def hazards_of(plan: Plan, question: Question, gpu_mttf_hours: float, measured: Measured) -> Hazards:
    """What a run by `plan` is up against, with a save behind the training; what was not measured is assumed."""
    written, ranks = checkpoint_bytes(question.architecture), plan.layout.ranks
    through_storage = written / (STORAGE_PER_NODE * -(-ranks // question.cluster.gpus_per_node))

    def known(value: float | None, assumed: float) -> float:
        return assumed if value is None else value
    return Hazards(
        gpu_mttf_hours * 3600 / ranks, known(measured.stall, written / ranks / COPY_PER_GPU),
        known(measured.save, through_storage), known(measured.detect, DETECT_SECONDS),
        known(measured.start, START_SECONDS) + known(measured.load, through_storage))


def compare_saves(plan: Plan, question: Question, hazards: Hazards, seed: int = 0) -> list[dict[str, Any]]:
    """Simulate a run whose training waits for its saves, and one that saves behind it, each at its best interval.

    A run of more than MOST_FAILURES is simulated as far as those reach, one that does not get on not at all: its shares
    are those expected.
    """
    found = []
    for flags, one in (("", replace(hazards, stall=hazards.write)), (ASYNC, hazards)):
        interval = min(question.steps, one.best_interval(plan.step.seconds))
        expected = one.expected_share(interval * plan.step.seconds)
        shares = np.array([expected])
        if expected >= LEAST_SHARE:
            steps = min(question.steps, interval + round(MOST_FAILURES * one.mttf * expected / plan.step.seconds))
            shares = simulate(one, plan.step.seconds, interval, steps, RUNS, seed)
        low, median, high = (float(x) for x in np.percentile(shares, (MIDDLE[0], 50, MIDDLE[1])))
        found.append(dict(flags=f"--save-interval {interval} --most-recent-k {KEPT} {flags}".strip(),
                          save_interval=interval, checkpoint_bytes=checkpoint_bytes(question.architecture),
                          stall_seconds=one.stall, effective=float(shares.mean()), median=median, low=low, high=high,
                          only_at_the_end=interval == question.steps))
    return found


def describe(plan: Plan, hazards: Hazards, measured: Measured, saves: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Say what failures cost, and which of the `saves` that were compared cost least."""
    assumed = [name for name, value in vars(measured).items() if value is None]
    every = f"{hazards.mttf / 3600:.1f} h" if hazards.mttf > 360 else f"{hazards.mttf:.3g} s"
    yield (f"effective training time with a failure every {every}, noticed after "
           f"{hazards.detect:.0f} s; a save takes {hazards.write:.1f} s, start and load {hazards.restart:.1f} s"
           f"{f' ({', '.join(assumed)}: assumed, not measured)' if assumed else ''}:")
    for one in saves:
        if one["effective"] < LEAST_SHARE:
            yield (f"  no such run gets on with {one['flags']}: a failure every {hazards.mttf:.3g} s, "
                   f"{hazards.lost:.3g} s lost to each, and a save takes {hazards.write:.3g} s; raise --gpu-mttf-hours "
                   "(of one GPU) or lower --save-seconds")
            continue
        when = ("one save, at the end," if one["only_at_the_end"] else
                f"every {one['save_interval'] * plan.step.seconds / 60:.1f} min")
        yield (f"  {one['effective']:.1%} on average, {one['median']:.1%} in the median of {RUNS} simulated runs "
               f"({MIDDLE[1] - MIDDLE[0]}%: {one['low']:.1%} to {one['high']:.1%}) with {one['flags']}, {when} a stall "
               f"of {one['stall_seconds']:.1f} s")
    size = saves[0]["checkpoint_bytes"]
    yield (f"  a checkpoint takes {size / 1e9:,.1f} GB; with --most-recent-k {KEPT} --save must have room for the "
           f"{KEPT + 1} that are there while one is written, {(KEPT + 1) * size / 1e9:,.1f} GB")
