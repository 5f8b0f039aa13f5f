"""Small steps as the planner predicts them: memory by torch's allocator, and in the slow suite time too."""
import pytest
import torch

from hrm_megatron.planner.calibration import Calibration, Case
from hrm_megatron.planner.machines import Speeds


def test_the_allocator_holds_what_is_predicted(single_rank):
    from hrm_megatron.benchmark.steps import peak_bytes

    known = Calibration("cpu", 4, True, Speeds(1, 1, 1, 1, 0), (), ())
    for case in (Case(1, 128, 2, 256, 1, 2), Case(2, 128, 2, 256, 2, 5)):
        assert known.memory(case).total == pytest.approx(peak_bytes(case, torch.float32), rel=0.05)


def test_what_was_there_before_may_be_freed_at_any_moment():
    from hrm_megatron.benchmark.steps import most_held

    assert most_held([(1, 10, 5), (2, 99, -3), (3, 11, 4), (4, 10, -5), (5, 10, 2)]) == 9


@pytest.mark.slow
def test_steps_that_were_not_fitted_are_predicted(single_rank):
    from hrm_megatron.benchmark.steps import calibrate, table

    found = calibrate(torch.float32, 5, "this machine")
    print(*table(found), sep="\n")
    for one in found.held_out:
        assert found.memory(one.case).total == pytest.approx(one.peak_bytes, rel=0.05)
        assert found.step(one.case).seconds == pytest.approx(one.seconds, rel=0.15)
