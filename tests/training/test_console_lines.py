"""The lines of a run, exactly: two widths of a terminal, long runs, numbers that are none."""
import itertools
import math
from dataclasses import replace

import pytest

from hrm_megatron.training.console_lines import (
    StepReport,
    TimeLeft,
    duration,
    evaluation_line,
    facts_block,
    saved_line,
    step_line,
    thousands,
)

STEP = StepReport(step=1200, steps=10_000, loss=2.12345, exact=0.1234, bp_steps=5.0, lr=2.2e-4,
                  tokens_per_second=123_456.7, seconds_left=4980.0)
LONG = StepReport(step=999_999, steps=1_000_000, loss=12.3456, exact=1.0, bp_steps=4.25, lr=2.2e-4,
                  tokens_per_second=1.2345e6, seconds_left=100_000.0)
NONE = replace(STEP, loss=math.nan, exact=math.nan, lr=0.0, tokens_per_second=math.nan, seconds_left=None)


@pytest.mark.parametrize("report, width, line", [
    (STEP, 120,
     "step  1200/10000  loss  2.1235  exact  12.3%  bp 5     lr 2.20e-04      123,457 tokens/s   1h23m left"),
    (STEP, 80, " 1200/10000 loss 2.123 exact 12.3% bp 5 lr 2.2e-4 123k tok/s 1h23m left"),
    (LONG, 120,
     "step  999999/1000000  loss 12.3456  exact 100.0%  bp 4.25  lr 2.20e-04    1,234,500 tokens/s   1d03h left"),
    (LONG, 80, " 999999/1000000 loss 12.35 exact 100.0% bp 4.2 lr 2.2e-4 1.23M tok/s 1d03h left"),
    (NONE, 120,
     "step  1200/10000  loss     nan  exact   nan%  bp 5     lr 0.00e+00          nan tokens/s       ? left"),
    (NONE, 80, " 1200/10000 loss nan exact nan% bp 5 lr 0 nan tok/s ? left"),
    (replace(STEP, tflops=456.78), 120,
     "step  1200/10000  loss  2.1235  exact  12.3%  bp 5     lr 2.20e-04      123,457 tokens/s  456.8 TFLOP/s/GPU  "
     " 1h23m left"),
    # What does not fit is left out, the least telling first; the step and the loss are the last to go.
    (replace(LONG, tflops=456.78), 80, " 999999/1000000 loss 12.35 exact 100.0% 1.23M tok/s 456.8 TFLOP/s 1d03h left"),
    (LONG, 40, " 999999/1000000 loss 12.35 1d03h left"),
    (LONG, 12, " 999999/1000"),
])
def test_a_step_is_a_line(report, width, line):
    assert step_line(report, width) == line


def test_no_line_is_wider_than_the_terminal():
    values = itertools.product((1, 123_456, 10**7), (0.0, 1e-9, 9999.5, math.inf), (0.0, 1.0), (2.0, 12.75),
                               (0.0, 1e-10), (0.4, 999_950.0, 1e12), (0.0, 86_399.6, 1e9), (None, 1234.5))
    count = 0
    for steps, loss, exact, bp, lr, speed, left, tflops in values:
        for width in (12, 40, 80, 100, 120, 250):
            line = step_line(StepReport(steps, steps, loss, exact, bp, lr, speed, left, tflops), width)
            assert len(line) <= width and line, line
            count += 1
    assert count > 5000
    assert len(evaluation_line(10**7, 10**7, "validation", {"lm loss": 9999.5, "accuracy": 1, "exact accuracy": 1}, 1e9,
                               80)) <= 80


def test_columns_stay_where_they_are():
    lines = [step_line(replace(STEP, step=step, loss=loss, exact=exact, bp_steps=bp, lr=lr, tokens_per_second=speed,
                               seconds_left=left), 120)
             for step, loss, exact, bp, lr, speed, left in (
                 (1, 11.5, 0.0, 2, 0.0, 9.0, 400_000.0), (9999, 0.0301, 1.0, 3.75, 1e-12, 98_765_432.0, 3.0))]
    assert len({tuple(line.index(word) for word in ("loss", "exact", "bp", "lr", "tokens/s", "left"))
                for line in lines}) == 1


def test_evaluations_and_saves_are_a_line_each():
    means = {"lm loss": 1.38456, "accuracy": 0.53831, "exact accuracy": 0.22232, "another": 3.0}
    assert evaluation_line(20, 400, "validation", means, 3.2, 80) \
        == "step  20/400  validation: loss 1.3846  accuracy 53.8%  exact 22.2%  in 3s"
    assert evaluation_line(400, 400, "test", dict(means, accuracy=math.nan), 3.2, 50) \
        == "step 400/400  test: loss 1.3846  accuracy nan%  ex"
    assert saved_line(7, 10, "/runs/a/iter_0000007", 75.2, False) == "step  7/10  saved in 1m15s: /runs/a/iter_0000007"
    assert saved_line(7, 10, "/r", 0.1, True) == (
        "step  7/10  is being saved in the background, training waited 0.1 s: /r")


@pytest.mark.parametrize("seconds, text", [
    (0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (3599.4, "59m59s"), (3600, "1h00m"), (86_399, "23h59m"),
    (86_400, "1d00h"), (1e7, "115d17h"), (None, "?"), (math.nan, "?"), (math.inf, "?")])
def test_times_have_two_units(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("value, text", [
    (0, "0"), (9.6, "10"), (999.4, "999"), (999.6, "1.00k"), (12_345, "12.3k"), (999_499, "999k"), (999_501, "1.00M"),
    (1.2345e9, "1.23G"), (math.inf, "inf"), (math.nan, "nan")])
def test_rates_have_three_figures(value, text):
    assert thousands(value) == text


def test_facts_have_an_order_and_are_wrapped_for_a_terminal():
    facts = ["schedule: a", "data: b", "a surprise", "layout: c\n  stage 0: " + "d " * 20, "data: e"]
    assert facts_block(facts, None).splitlines() == ["a surprise", "layout: c", "  stage 0: " + "d " * 20, "data: b",
                                                     "data: e", "schedule: a"]
    assert facts_block(facts, 40).splitlines() == [
        "a surprise", "layout: c", "  stage 0: d d d d d d d d d d d d d d d", "    d d d d d", "data: b", "data: e",
        "schedule: a"]


def test_the_time_left_follows_the_cost_of_the_steps_to_come():
    now = [100.0]
    left = TimeLeft([2, 2, 4, 4], lambda: now[0])
    assert left.after(1) is None  # nothing was timed
    left.start(0)
    now[0] += 10
    assert left.after(1) == 50.0  # 5 seconds a unit; 2 + 4 + 4 are left
    left.start(1)  # the first step took longer than the others will
    assert left.after(1) is None
    now[0] += 6
    assert left.after(2) == 24.0
    now[0] += 12
    assert (left.after(3), left.after(4)) == (12.0, 0.0)
