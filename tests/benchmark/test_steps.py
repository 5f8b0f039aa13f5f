"""Small steps as the planner predicts them: memory by torch's allocator, and in the slow suite time too."""
import pytest
import torch

from hrm_megatron.config import ConfigError
from hrm_megatron.planner.calibration import Calibration, Case
from hrm_megatron.planner.machines import Speeds


def test_the_allocator_holds_what_is_predicted(single_rank):
    from hrm_megatron.benchmark.steps import peak_bytes

    known = Calibration("cpu", 4, True, Speeds(1, 1, 1, 1, 0), (), ())
    for case in (Case(1, 128, 2, 256, 1, 2), Case(2, 128, 2, 256, 2, 5)):
        assert known.memory(case).total == pytest.approx(peak_bytes(case, torch.float32), rel=0.05)


def test_a_profile_counts_if_all_is_given_back():
    from hrm_megatron.benchmark.steps import most_held

    assert most_held([(3, 4), (1, 5), (4, -5), (2, 1), (6, -4), (5, -1)]) == 10
    assert most_held([(1, 5), (2, -5)]) == 5 and most_held([]) == 0
    assert most_held([(1, 5), (2, 5), (3, -5)]) is most_held([(1, -5)]) is None


def test_a_profile_that_lost_an_event_is_made_again(single_rank, monkeypatch):
    from hrm_megatron.benchmark import steps

    case, real, lost = Case(1, 32, 1, 128, 1, 2), steps.allocations, [5, 70]
    want = steps.peak_bytes(case, torch.float32)

    def losing(events):
        found = sorted(real(events))
        return found[:(at := lost.pop())] + found[at + 1:] if lost else found
    monkeypatch.setattr(steps, "allocations", losing)
    assert steps.peak_bytes(case, torch.float32) == want and not lost
    monkeypatch.setattr(steps, "allocations", lambda events: real(events)[1:])
    monkeypatch.setattr(steps, "PROFILES", 2)
    with pytest.raises(ConfigError, match="profiler lost events 2 times; measure where"):
        steps.peak_bytes(case, torch.float32)


@pytest.mark.slow
def test_steps_that_were_not_fitted_are_predicted(single_rank):
    from hrm_megatron.benchmark.steps import calibrate, table

    found = calibrate(torch.float32, 5, "this machine")
    print(*table(found), sep="\n")
    for one in found.held_out:
        assert found.memory(one.case).total == pytest.approx(one.peak_bytes, rel=0.05)
        assert found.step(one.case).seconds == pytest.approx(one.seconds, rel=0.15)
