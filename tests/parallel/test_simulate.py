"""The simulated schedule: its figures, and that it is Megatron's."""
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

from hrm_megatron.model.ticks import unroll
from hrm_megatron.parallel.simulate import (
    AUTO,
    STOCK,
    TWO_PHASE,
    Operation,
    interleaved,
    second_phase,
    stock,
    two_phase,
)
from hrm_megatron.parallel.stages import microbatch_group


def gradients(bp_steps):
    return [tick.with_grad for tick in unroll(2, 3, bp_steps)]


@pytest.mark.parametrize("stages, microbatches, bp_steps, percent", [
    (2, 32, 2, 6.9), (4, 32, 2, 10.9), (8, 32, 2, 15.3), (2, 32, 5, 4.0), (4, 16, 5, 8.1), (4, 32, 5, 6.9),
    (8, 32, 5, 10.2), (4, 32, 8, 1.6)])
def test_bubbles_are_those_of_an_independent_simulation(stages, microbatches, bp_steps, percent):
    """Figures of a prototype whose order of operations was held against the real schedule."""
    found = stock(microbatches, gradients(bp_steps), stages)
    assert 100 * found.bubble == pytest.approx(percent, abs=0.05)


@pytest.mark.parametrize("stages, microbatches, bp_steps, percent", [
    (2, 32, 2, 2.9), (4, 32, 2, 4.4), (8, 32, 2, 7.4), (2, 32, 5, 1.2), (4, 16, 5, 4.2), (4, 32, 5, 2.4),
    (8, 32, 5, 4.7), (8, 64, 5, 2.6)])
def test_two_phases_wait_less(stages, microbatches, bp_steps, percent):
    found = two_phase(microbatches, gradients(bp_steps), stages)
    assert 100 * found.bubble == pytest.approx(percent, abs=0.05)
    first = gradients(bp_steps).index(True)
    assert second_phase(AUTO, gradients(bp_steps), microbatches, stages) == first > 0
    assert found.live_graphs <= (bp_steps + 1) * stages


def test_two_phases_are_not_taken_where_they_lose():
    assert second_phase(AUTO, gradients(5), 32, 4, 8) == 0  # windows of 8
    assert second_phase(TWO_PHASE, gradients(5), 8, 8) == 3 and second_phase(STOCK, gradients(5), 32, 4) == 0
    assert second_phase(TWO_PHASE, gradients(8), 32, 4) == 0  # no tick without gradient


@pytest.mark.parametrize("stages, bp_steps", [(2, 5), (4, 5), (8, 2), (4, 3)])
def test_a_gradient_tick_is_alive_on_one_stage_for_each_stage(stages, bp_steps):
    assert stock(32, gradients(bp_steps), stages).live_graphs == bp_steps * stages


def test_one_stage_never_waits():
    assert stock(5, gradients(5), 1).bubble == pytest.approx(0)


def test_every_tick_of_every_micro_batch_runs_once_each_way():
    for stage in range(4):
        order = interleaved(range(7), range(8), stage, 4)
        assert len(order) == len(set(order)) == 2 * 7 * 8
        for m in range(7):
            mine = [op for op in order if op.microbatch == m]
            assert [op.tick for op in mine if not op.backward] == list(range(8))
            assert [op.tick for op in mine if op.backward] == list(range(7, -1, -1))
            assert all(mine.index(Operation(False, m, t)) < mine.index(Operation(True, m, t)) for t in range(8))


@pytest.mark.parametrize("microbatches, stages", [(4, 4), (8, 4), (5, 4), (6, 2), (7, 2)])
def test_the_order_is_that_of_megatron(single_rank, microbatches, stages):
    from megatron.core.pipeline_parallel.schedules import get_schedule_table

    table = get_schedule_table(microbatches, 8, microbatch_group(microbatches, stages))
    for stage in range(stages):
        forward = [op for op in interleaved(range(microbatches), range(8), stage, stages) if not op.backward]
        assert [(op.microbatch, op.tick) for op in forward] == [tuple(entry) for entry in table]


@pytest.mark.parametrize("window", [16, 8, 4])
def test_windows_cost_the_bubble_of_as_few_micro_batches(window):
    found, alone = two_phase(32, gradients(5), 4, window), two_phase(window, gradients(5), 4)
    assert found.bubble == pytest.approx(alone.bubble) and found.live_graphs == alone.live_graphs
    assert second_phase(AUTO, gradients(5), 32, 4, window) == (3 if window > 8 else 0)  # one phase waits 6.9 %


def test_the_first_stage_goes_on_while_the_last_is_in_the_first_phase():
    first, *_, last = two_phase(8, gradients(5), 4).timelines
    begins = next(start for operation, start, _ in first if operation.tick == 3)
    ends = max(end for operation, _, end in last if operation.tick == 2)
    assert begins == max(end for operation, _, end in first if operation.tick == 2) < ends


def test_timelines_are_without_overlap_and_end_together_with_the_step():
    found = two_phase(8, gradients(5), 4)
    assert len(found.timelines) == 4
    for timeline in found.timelines:
        assert all(end <= start for (_, _, end), (_, start, _) in itertools.pairwise(timeline))
    busy = sum(end - start for _, start, end in found.timelines[0])
    assert busy / max(timeline[-1][2] for timeline in found.timelines) == pytest.approx(1 - found.bubble)


def test_the_picture_is_drawn_and_what_cannot_be_is_refused(tmp_path):
    def draw(*arguments):
        return subprocess.run([sys.executable, "tools/draw_pipeline.py", "--output", tmp_path / "p.png", *arguments],
                              cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert draw("--stages", "2", "--microbatches", "4").returncode == 0
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    refused = draw("--stages", "4", "--microbatches", "3")
    assert refused.returncode == 1 and refused.stderr == (
        "error: --microbatches 3: fewer than the 4 stages; give at least 4, or fewer --stages\n")
