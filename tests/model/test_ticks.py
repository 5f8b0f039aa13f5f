"""The list of ticks against the reference's table and the paper's words."""
import pytest

from hrm_megatron.config import ConfigError
from hrm_megatron.model.ticks import split_bp_steps, states_between, trains_embedding, unroll


def test_the_split_equals_the_reference(golden_case):
    table = golden_case("schedule").facts["bp_split"]
    assert len(table) > 4
    for case in table:
        want = case["H_bp_steps"], case["L_bp_steps"]
        assert split_bp_steps(case["H_cycles"], case["L_cycles"], case["bp_steps"]) == want


def test_ticks_run_fast_before_slow():
    assert "".join(tick.stack for tick in unroll(2, 3)) == "LLLHLLLH"
    assert "".join(tick.stack for tick in unroll(3, 1)) == "LHLHLH"
    assert all(tick.with_grad for tick in unroll(2, 3))


@pytest.mark.parametrize(("bp_steps", "graph"), [(2, {6, 7}), (3, {3, 6, 7}), (4, {3, 5, 6, 7}), (5, {3, 4, 5, 6, 7}),
                                                 (8, set(range(8)))])
def test_the_last_ticks_of_each_stack_build_a_graph(bp_steps, graph):
    assert {i for i, tick in enumerate(unroll(2, 3, bp_steps)) if tick.with_grad} == graph


@pytest.mark.parametrize(("bp_steps", "recompute_ticks", "again"), [
    (2, 0, set()), (2, 1, {6}), (2, 5, {6, 7}), (3, 2, {3, 6}), (4, 3, {3, 5, 6}), (5, 5, {3, 4, 5, 6, 7}),
    (None, 1, {0})])
def test_the_first_ticks_with_gradient_run_again(bp_steps, recompute_ticks, again):
    ticks = unroll(2, 3, bp_steps, recompute_ticks)
    assert {i for i, tick in enumerate(ticks) if tick.recompute} == again
    assert [tick[:2] for tick in ticks] == [tick[:2] for tick in unroll(2, 3, bp_steps)]


@pytest.mark.parametrize("bp_steps", [-1, 0, 1, 9])
def test_impossible_gradient_ticks_are_refused(bp_steps):
    with pytest.raises(ConfigError, match=f"bp_steps={bp_steps} does not fit h_cycles=2, l_cycles=3: choose 2 to 8"):
        unroll(2, 3, bp_steps)


def test_a_pass_goes_on_from_z_l_and_from_z_h_once_that_is_not_the_embedding():
    assert [states_between(unroll(2, 3), first) for first in range(1, 8)] == [1, 1, 1, 2, 2, 2, 2]


def test_the_embedding_is_trained_only_through_all_slow_ticks():
    assert [trains_embedding(unroll(2, 3, bp)) for bp in (2, 3, 4)] == [False, True, True]
    assert [trains_embedding(unroll(1, 3, bp)) for bp in (2, 3)] == [True, True]
