"""Steps at equal FLOPs, against the sum over every single step."""
from collections import Counter
from dataclasses import replace

import pytest

from hrm_megatron.config import LORA_TARGETS, PRESETS, ConfigError, LoRA
from hrm_megatron.model_types import HRM, MODEL_TYPES
from hrm_megatron.optim.schedule import BPSchedule
from hrm_megatron.planner.flops import rows_flops, steps_by_bp
from hrm_megatron.planner.match_flops import Recipe, matched_steps, run_flops

ROWS = [[(5, 20), (30, 8)], [(60, 3)], [(2, 50)]]


def recipe(model_type, size="XL"):
    return Recipe(PRESETS[size].architecture(model_type=model_type), (*MODEL_TYPES[model_type].bp_steps, 0.2))


@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("steps", [200, 1357])
def test_flops_are_equal_within_a_hundredth_and_no_other_number_is_nearer(model_type, steps):
    def by_step(recipe, steps):
        schedule = BPSchedule(*recipe.bp, steps)
        return sum(rows_flops(recipe.architecture, schedule.at(step), 64, ROWS) * 6 / 3 for step in range(1, steps + 1))
    budget = by_step(recipe(HRM), steps)
    assert run_flops(recipe(HRM), steps, 64, 6, ROWS) == pytest.approx(budget, rel=1e-12)
    found = matched_steps(recipe(model_type), budget, 64, 6, ROWS)
    errors = [abs(by_step(recipe(model_type), n) / budget - 1) for n in (found - 1, found, found + 1)]
    assert errors[1] <= 0.01 and errors[1] == min(errors)
    if model_type == HRM:
        assert found == steps


def test_a_run_of_adapters_gets_more_steps():
    adapters = replace(recipe(HRM), lora=LoRA(4, 4.0, LORA_TARGETS))
    step = rows_flops(adapters.architecture, 5, 64, ROWS, lora=adapters.lora) * 6 / 3
    assert run_flops(replace(adapters, bp=(5, 5, 0.2)), 7, 64, 6, ROWS) == pytest.approx(7 * step, rel=1e-12)
    budget = run_flops(recipe(HRM), 300, 64, 6, ROWS)
    found = matched_steps(adapters, budget, 64, 6, ROWS)
    assert found > 330 and run_flops(adapters, found, 64, 6, ROWS) == pytest.approx(budget, rel=0.01)


def test_steps_are_counted_without_going_through_them():
    for total in (1, 2, 7, 100, 1357):
        for bp in ((2, 5, 0.2), (1, 8, 1.0), (3, 3, 0.5), (2, 8, 0.0)):
            schedule = BPSchedule(*bp, total)
            assert steps_by_bp(schedule) == Counter(schedule.at(step) for step in range(1, total + 1))
    assert sum(steps_by_bp(BPSchedule(2, 5, 0.2, 10 ** 18)).values()) == 10 ** 18


def test_too_coarse_a_step_is_refused():
    with pytest.raises(ConfigError, match="give more --train-iters"):
        matched_steps(recipe("ut"), run_flops(recipe(HRM), 3, 64, 6, ROWS), 64, 6, ROWS)
