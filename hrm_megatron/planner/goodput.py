"""Effective training time (goodput): the fraction of wall-clock time spent on steps that no later failure discards.

Failures occur at a constant rate per GPU. After one, the failure is detected, the run restarts, loads the latest
complete checkpoint and repeats the steps since.
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

SAVED_BYTES = 4 * 4  # per weight in a checkpoint, besides the weight: master, both moments and EMA in fp32
GPU_MTTF_HOURS = 8 * 1024.0  # one failure per 8 hours on 1,024 GPUs
# Assumptions where nothing was measured.
STORAGE_PER_NODE = 1e9  # bytes/s of a shared file system
COPY_PER_GPU = 1e10  # bytes/s from a GPU to its host, for an asynchronous save
START_SECONDS, DETECT_SECONDS = 90.0, 120.0

RUNS, MIDDLE = 200, (5, 95)  # simulated runs, and their reported percentiles
MOST_FAILURES = 1000  # of a simulated run
LEAST_SHARE = 0.01  # effective share below which a run makes no progress
MOST_EXPONENT = 700  # of math.exp in fp64
# Longest time between saves, if stalls then cost less than LEAST_SHARE: a run also restarts for other reasons than GPU
# failures.
MOST_SECONDS = 3600
ASYNC = "--async-save --use-persistent-ckpt-worker"
KEPT = 2  # checkpoints: the latest, and one more in case it is damaged


@dataclass(frozen=True)
class Hazards:
    """All in seconds. `mttf` is that of the whole job. A save blocks training for `stall` and is complete `write` after
    it began. A failure is detected after `detect`, and training resumes `restart` later (start and load)."""

    mttf: float
    stall: float
    write: float
    detect: float
    restart: float

    @property
    def lost(self) -> float:
        """Time from a failure until training resumes; another failure within it starts it over."""
        return self.detect + self.restart

    def expected_share(self, interval: float) -> float:
        """Return the expected share of the time that is not lost, with a save after each `interval` seconds of steps.

        `interval / (M e^(R/M) (e^((interval + stall)/M) - 1))` of J. Daly, A higher order estimate of the optimum
        checkpoint interval for restart dumps, Future Generation Computer Systems 22 (2006), equation 20: exact for
        synchronous saves. An asynchronous save is unusable while it is written; that time is added to R.
        """
        behind = max(0.0, self.write - self.stall)
        lost, cycle = (self.lost + behind) / self.mttf, (interval + self.stall) / self.mttf
        return interval / (self.mttf * math.exp(lost) * math.expm1(cycle)) if lost + cycle < MOST_EXPONENT else 0.0

    def best_interval(self, step_seconds: float) -> int:
        """Return the steps between saves with the highest expected share: at least as long as a save takes to write, at
        most MOST_SECONDS, or more if stalls would then cost more than LEAST_SHARE of the time."""
        least = max(1, math.ceil(self.write / step_seconds))
        most = max(MOST_SECONDS, self.stall / LEAST_SHARE)
        young = math.sqrt(2 * max(self.stall, step_seconds / 100) * self.mttf)
        candidates = {max(least, round(min(most, young * factor) / step_seconds))
                      for factor in np.geomspace(0.05, 5, 400)}
        return max(sorted(candidates), key=lambda steps: self.expected_share(steps * step_seconds))


def simulate(hazards: Hazards, step_seconds: float, interval: int, steps: int, runs: int, seed: int) -> np.ndarray:
    """Return the effective share of the time of each of `runs` simulated runs of `steps` steps, [runs], with a save
    after each `interval` steps."""
    rng = np.random.default_rng(seed)
    return np.array([steps * step_seconds / _one_run(hazards, step_seconds, interval, steps, rng)
                     for _ in range(runs)])


def _one_run(hazards: Hazards, step_seconds: float, interval: int, steps: int, rng: np.random.Generator) -> float:
    """Return the simulated seconds of one run."""
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
    """Seconds measured by a run; None: not measured."""

    save: float | None = None
    stall: float | None = None  # of an asynchronous save
    load: float | None = None
    start: float | None = None
    detect: float | None = None


def checkpoint_bytes(architecture: Architecture) -> int:
    """Return the bytes of one checkpoint, with weights in bf16."""
    return architecture.num_parameters * (BF16 + SAVED_BYTES)


def hazards_of(plan: Plan, question: Question, gpu_mttf_hours: float, measured: Measured) -> Hazards:
    """Return the hazards of a run of `plan` with asynchronous saves; values that were not measured are assumed."""
    written, ranks = checkpoint_bytes(question.architecture), plan.layout.ranks
    through_storage = written / (STORAGE_PER_NODE * -(-ranks // question.cluster.gpus_per_node))

    def known(value: float | None, assumed: float) -> float:
        return assumed if value is None else value
    return Hazards(
        gpu_mttf_hours * 3600 / ranks, known(measured.stall, written / ranks / COPY_PER_GPU),
        known(measured.save, through_storage), known(measured.detect, DETECT_SECONDS),
        known(measured.start, START_SECONDS) + known(measured.load, through_storage))


def compare_saves(plan: Plan, question: Question, hazards: Hazards, seed: int = 0) -> list[dict[str, Any]]:
    """Simulate runs with synchronous and with asynchronous saves, each at its best interval; return a record of each.

    The simulation covers about MOST_FAILURES failures at most. A run that makes no progress is not simulated: its
    shares are the expected ones.
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
    """Yield lines about the cost of failures and the effective training time with each of `saves`."""
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
