"""Steps at equal FLOPs, against the sum over every single step."""
import pytest

from hrm_megatron.config import PRESETS, ConfigError
from hrm_megatron.model_types import HRM, MODEL_TYPES
from hrm_megatron.optim.schedule import BPSchedule
from hrm_megatron.planner.flops import rows_flops
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


def test_too_coarse_a_step_is_refused():
    with pytest.raises(ConfigError, match="give more --train-iters"):
        matched_steps(recipe("ut"), run_flops(recipe(HRM), 3, 64, 6, ROWS), 64, 6, ROWS)
