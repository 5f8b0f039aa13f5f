"""Effective training time: the simulation against the exact expectation, and the search for the best interval."""
from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from hrm_megatron.config import PRESETS
from hrm_megatron.planner import goodput
from hrm_megatron.planner.goodput import Hazards, Measured, compare_saves, describe, hazards_of, simulate
from hrm_megatron.planner.machines import Cluster
from hrm_megatron.planner.search import Question, search

RARE = Hazards(mttf=16 * 3600, stall=30, write=30, detect=120, restart=100)
OFTEN = Hazards(mttf=1000, stall=60, write=60, detect=100, restart=200)  # restarts fail too
BEHIND = replace(RARE, stall=1, write=300)


@pytest.mark.parametrize("hazards", [RARE, OFTEN], ids=["rare", "often"])
@pytest.mark.parametrize("minutes", [2, 10, 40])
def test_the_simulation_takes_as_long_as_the_exact_formula_says(hazards, minutes):
    """Where training waits for its saves. The mean of the times, not of their inverses, is what the formula gives; it
    lies within five standard errors of it but once in two million times, and the seed is fixed."""
    steps, interval = 60 * minutes * 200, 60 * minutes
    seconds = steps / simulate(hazards, 1.0, interval, steps, 300, seed=0)
    error = seconds.std(ddof=1) / math.sqrt(len(seconds))
    assert abs(seconds.mean() - steps / hazards.expected_share(interval)) < 5 * error


def test_what_is_written_behind_the_training_may_be_lost():
    """A failure before a save is complete falls back to the one before: the longer that takes, the more is lost."""
    steps, runs = 200_000, 100
    shares = [simulate(replace(BEHIND, write=write), 1.0, 700, steps, runs, seed=0).mean() for write in (1, 300, 600)]
    assert shares == sorted(shares, reverse=True) and shares[0] - shares[2] == pytest.approx(
        (600 - 1) / BEHIND.mttf, rel=0.5)
    for hazards, share in zip((replace(BEHIND, write=1), BEHIND), shares[:2], strict=True):
        assert share == pytest.approx(hazards.expected_share(700), abs=2e-3)


def test_without_failures_only_stalls_cost():
    shares = simulate(replace(RARE, mttf=1e15), 2.0, 100, 1000, 3, seed=0)
    assert np.allclose(shares, 2000 / (2000 + 10 * 30), rtol=1e-12)


@pytest.mark.parametrize("hazards", [RARE, OFTEN, BEHIND], ids=["rare", "often", "behind"])
def test_the_best_interval_is_the_best_of_all(hazards):
    """Of every interval, to the width of the grid that is searched; near Young's where failures are rare."""
    found, every = hazards.best_interval(1.0), range(math.ceil(hazards.write), 20_000)
    best = max(every, key=hazards.expected_share)
    assert hazards.expected_share(found) == pytest.approx(hazards.expected_share(best), abs=1e-5)
    if hazards is RARE:
        assert found == pytest.approx(math.sqrt(2 * hazards.stall * hazards.mttf), rel=0.05)
    assert found >= hazards.write  # a save begins when the last is complete


def test_saves_come_each_hour_unless_their_stalls_cost_a_hundredth():
    """Failures of GPUs alone would let a run save at its end only."""
    assert replace(BEHIND, mttf=1e12).best_interval(1.0) == 3600
    assert replace(RARE, mttf=1e12, stall=600, write=600).best_interval(1.0) == 600 / 0.01


def shares_of(steps: int, hazards: Hazards) -> tuple[list[dict[str, Any]], list[str]]:
    plan = SimpleNamespace(step=SimpleNamespace(seconds=2.0))
    question = SimpleNamespace(steps=steps, architecture=PRESETS["XL"].architecture(65_536))
    saves = compare_saves(plan, question, hazards)
    return saves, [*describe(plan, hazards, Measured(), saves)][1:-1]


@pytest.mark.parametrize("hazards", [
    replace(RARE, mttf=1e-4), replace(RARE, mttf=20), replace(RARE, write=1e9, stall=1)], ids=["never", "no", "save"])
def test_a_run_that_does_not_get_on_is_not_simulated(hazards, monkeypatch):
    monkeypatch.setattr(goodput, "simulate", None)
    saves, lines = shares_of(10 ** 6, hazards)
    assert all(one["effective"] < 0.01 for one in saves) and len(lines) == 2
    assert all("no such run gets on" in line and f"a failure every {hazards.mttf:.3g} s, " in line
               and "raise --gpu-mttf-hours (of one GPU) or lower --save-seconds" in line for line in lines)


def test_only_so_many_failures_are_simulated():
    saves, lines = shares_of(10 ** 15, replace(OFTEN, stall=1))
    assert len(lines) == 2 and all(0.01 < one["low"] <= one["median"] <= one["high"] for one in saves)


def test_a_rare_failure_is_in_the_mean_and_not_in_the_middle():
    saves, lines = shares_of(1500, replace(RARE, mttf=3e5))
    assert all(one["effective"] < one["low"] <= one["median"] <= one["high"] for one in saves)
    assert f"{saves[1]['effective']:.1%} on average, {saves[1]['median']:.1%} in the median of 200 " in lines[1]
    assert "one save, at the end, a stall of 30.0 s" in lines[1]


def test_64_nodes_reach_97_percent_by_two_settings():
    preset = PRESETS["XXXL"]
    question = Question(preset.architecture(65_536), Cluster.of("h100-80gb", 512), 1e11, preset.tokens_per_step // 4096,
                        4096, (2, 5, 0.2))
    plan = search(question)[0][0]
    hazards = hazards_of(plan, question, goodput.GPU_MTTF_HOURS, Measured(save=60, load=60, start=120, detect=300))
    assert hazards.mttf == 16 * 3600 and hazards.restart == 180 and hazards.write == 60
    assert hazards.stall == pytest.approx(18 * question.architecture.num_parameters / 512 / 1e10)
    waiting, behind = compare_saves(plan, question, hazards)
    assert waiting["effective"] < behind["effective"] and behind["effective"] >= 0.97
    first, *lines, space = describe(plan, hazards, Measured(save=60, load=60, start=120, detect=300), [waiting, behind])
    assert "a failure every 16.0 h" in first and "(stall: assumed, not measured)" in first
    assert len(lines) == 2 and "--async-save" in lines[1] and f"{behind['effective']:.1%}" in lines[1]
    assert all(f"--save-interval {one['save_interval']} --most-recent-k 2" in line
               for one, line in zip((waiting, behind), lines, strict=True))
    size = 18 * question.architecture.num_parameters / 1e9
    assert f"takes {size:.1f} GB" in space and f"the 3 that are there while one is written, {3 * size:.1f} GB" in space
