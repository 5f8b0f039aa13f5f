"""Learning rate and gradient ticks of every step against the reference's own tables, without a tolerance."""
import math
from types import SimpleNamespace

import pytest

from hrm_megatron.config import ConfigError
from hrm_megatron.optim.schedule import BPSchedule, LRSchedule, as_fp32, lr_steps_of


def test_learning_rates_equal_the_reference(golden_case):
    cases = golden_case("schedule").facts["lr"]
    assert len(cases) == 6
    for case in cases:
        schedule = LRSchedule(case["lr"], case["lr"] * case["lr_min_ratio"], case["lr_warmup_steps"],
                              case["total_steps"])
        assert case["columns"] == ["step", "lr_python_float", "lr_fp32_used"]
        for step, _, want in case["table"]:
            if step <= case["total_steps"]:
                assert schedule.at(step) == want, (case["lr"], step)
            else:  # where no run of the reference steps, and its formula climbs back to `lr`
                assert schedule.at(step) == as_fp32(schedule.min_lr) and want >= schedule.at(step)


def test_gradient_ticks_equal_the_reference(golden_case):
    cases = golden_case("schedule").facts["bp"]
    assert len(cases) == 6
    for case in cases:
        schedule = BPSchedule(case["bp_min_steps"], case["bp_max_steps"], case["bp_warmup_ratio"], case["total_steps"])
        for step, want in case["table"]:
            assert schedule.at(step) == want, (case["bp_warmup_ratio"], step)


@pytest.mark.parametrize("run", ["trajectory", "fullbatch/run"])
def test_a_run_of_the_reference_used_the_same_numbers(golden_case, run):
    facts = golden_case(run).facts
    config, total_steps = facts["config"], facts["total_steps"]
    arch = config["arch"]
    lr = LRSchedule(config["lr"], config["lr"] * config["lr_min_ratio"], config["lr_warmup_steps"], total_steps)
    bp = BPSchedule(arch["bp_min_steps"], arch["bp_max_steps"], arch["bp_warmup_ratio"], total_steps)
    steps = facts["steps"]
    assert len(steps) > 20
    assert [(lr.at(each["step"]), bp.at(each["step"])) for each in steps] \
        == [(each["lr"], each["bp_steps"]) for each in steps]


def test_the_ends_of_a_schedule_are_what_was_asked():
    schedule = LRSchedule(3e-4, 3e-5, warmup_steps=7, total_steps=31)
    assert schedule.at(7) == as_fp32(3e-4) and schedule.at(31) == as_fp32(3e-5)
    assert schedule.at(1) == as_fp32(3e-4 / 7)
    assert schedule.at(19) == as_fp32((3e-4 + 3e-5) / 2)  # half of the cosine
    assert [LRSchedule(3e-4, 3e-4, 0, 5).at(step) for step in (1, 3, 5)] == [as_fp32(3e-4)] * 3
    assert [LRSchedule(0.0, 0.0, 2, 5).at(step) for step in (1, 4)] == [0.0, 0.0]
    assert [BPSchedule(2, 5, 0.0, 31).at(step) for step in (1, 31)] == [5, 5]
    assert BPSchedule(2, 6, 1.0, 31).at(31) == 6 and BPSchedule(2, 6, 1.0, 31).at(30) == 5


@pytest.mark.parametrize("schedule", [LRSchedule(3e-4, 3e-5, 7, 31), LRSchedule(3e-4, 0.0, 0, 10),
                                      LRSchedule(3e-4, 1e-4, 9, 9), LRSchedule(3e-4, 3e-4, 3, 20)])
def test_the_rate_holds_its_minimum_after_the_end_and_never_rises(schedule):
    after = [schedule.at(step) for step in range(schedule.warmup_steps, 4 * schedule.total_steps)]
    assert after == sorted(after, reverse=True)
    beyond = {schedule.at(step) for step in range(schedule.total_steps + 1, 4 * schedule.total_steps)}
    assert beyond == {as_fp32(schedule.min_lr)}


@pytest.mark.parametrize("fraction, iterations, steps", [(0.29, 100, 29), (0.57, 100, 57), (0.25, 10, 2), (0.1, 7, 0),
                                                         (1.0, 7, 7), (1e-3, 5000, 5)])
def test_a_fraction_of_warm_up_is_taken_as_it_is_written(fraction, iterations, steps):
    given = SimpleNamespace(lr_decay_iters=None, train_iters=iterations, lr_warmup_fraction=fraction)
    assert lr_steps_of(given) == (steps, iterations)


def test_rounding_to_fp32_is_that_of_the_hardware():
    import numpy as np

    values = [0.1, 1 / 3, 2.2e-4, 1e-30, 16777217.0]
    assert [as_fp32(value) for value in values] == [float(np.float32(value)) for value in values]
    assert as_fp32(16777217.0) == 16777216.0


@pytest.mark.parametrize(("settings", "message"), [
    ((1e-3, 2e-3, 0, 9), r"min_lr=0\.002 must lie between 0 and lr=0\.001"),
    ((1e-3, -1e-9, 0, 9), "min_lr=-1e-09 must lie between 0 and lr"),
    ((math.nan, 0.0, 0, 9), "must lie between 0 and lr=nan"),
    ((1e-3, 0.0, 10, 9), "warmup_steps=10 must lie between 0 and total_steps=9: lower --lr-warmup-iters"),
    ((1e-3, 0.0, -1, 9), "warmup_steps=-1 must lie between"),
])
def test_an_impossible_learning_rate_is_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        LRSchedule(*settings)


@pytest.mark.parametrize(("settings", "message"), [
    ((0, 5, 0.2, 9), "bp_min_steps=0, bp_max_steps=5: need 1 <= min <= max"),
    ((4, 3, 0.2, 9), "bp_min_steps=4, bp_max_steps=3: need"),
    ((2, 5, 1.1, 9), r"bp_warmup_fraction=1\.1 must lie between 0 and 1"),
    ((2, 5, -0.1, 9), r"bp_warmup_fraction=-0\.1 must lie"),
    ((2, 5, math.nan, 9), "bp_warmup_fraction=nan must lie"),
])
def test_impossible_gradient_ticks_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        BPSchedule(*settings)
