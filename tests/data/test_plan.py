import subprocess
import sys

import numpy as np
import pytest

from hrm_megatron.config import ConfigError
from hrm_megatron.data.plan import RowPlan, Rows, best_fit, plan_epoch, shuffled_order


def lognormal_lengths(count, mean=200, longest=4096):
    lengths = np.random.default_rng(7).lognormal(np.log(mean) - 0.5, 1.0, count)
    return np.clip(lengths.astype(np.int64), 2, longest)


def rows_of(plan):
    return [plan[i].tolist() for i in range(len(plan))]


def planned(lengths, row_tokens, seed=3, epoch=0, **options):
    lengths = np.asarray(lengths)
    return plan_epoch(lengths, row_tokens, shuffled_order(len(lengths), seed, epoch), seed, epoch, **options)


@pytest.mark.parametrize("count, row_tokens, window", [(1, 9, 4), (5, 9, 4), (301, 4096, 64), (997, 4300, 10_000)])
def test_every_example_appears_once_and_no_row_overflows(count, row_tokens, window):
    lengths = lognormal_lengths(count, longest=min(row_tokens, 4096))
    plan = planned(lengths, row_tokens, window_examples=window)
    assert sorted(plan.example_ids.tolist()) == list(range(count))
    assert plan.offsets[0] == 0 and plan.offsets[-1] == count
    for row in rows_of(plan):
        assert row and 0 < lengths[row].sum() <= row_tokens


def test_rows_may_be_exactly_full():
    assert sorted(map(sorted, rows_of(planned([5, 2, 3, 4, 1, 5], 5)))) == [[0], [1, 2], [3, 4], [5]]
    assert rows_of(planned([7], 7)) == [[0]]


def test_best_fit_takes_the_fullest_row_with_room():
    # 6 and 5 open a row each; 4 fills the first; 3 fits the second only; 2 fills that one; 1 opens the third.
    assert best_fit(np.array([1, 2, 3, 4, 5, 6]), 10).tolist() == [2, 1, 1, 0, 1, 0]


def best_fit_by_definition(lengths, row_tokens):
    rooms, rows = [], {}
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fitting = [row for row, room in enumerate(rooms) if room >= lengths[i]]
        if not fitting:
            rooms.append(row_tokens)
            fitting = [len(rooms) - 1]
        rows[i] = min(fitting, key=lambda row: (rooms[row], row))
        rooms[rows[i]] -= lengths[i]
    return [rows[i] for i in range(len(lengths))]


@pytest.mark.parametrize("count, row_tokens", [(2, 5), (40, 17), (200, 64)])
def test_best_fit_is_its_definition(count, row_tokens):
    lengths = np.random.default_rng(count).integers(1, row_tokens + 1, count)
    assert best_fit(lengths, row_tokens).tolist() == best_fit_by_definition(lengths.tolist(), row_tokens)


@pytest.mark.parametrize("mean, row_tokens", [(200, 4096), (900, 4096), (60, 512)])
def test_realistic_lengths_fill_the_rows(mean, row_tokens):
    lengths = lognormal_lengths(50_000, mean, row_tokens)
    plan = planned(lengths, row_tokens)
    fill = lengths.sum() / (len(plan) * row_tokens)
    print(f"mean length {mean}, rows of {row_tokens}: {fill:.2%} filled")
    assert fill >= 0.97


def test_long_examples_are_not_bunched():
    lengths = lognormal_lengths(20_000)
    plan = planned(lengths, 4096)
    longest = np.array([lengths[row].max() for row in rows_of(plan)])
    halves = [part.mean() for part in np.array_split(longest, 2)]
    assert abs(halves[0] - halves[1]) < 0.1 * longest.mean()
    assert abs(np.corrcoef(longest[:-1], longest[1:])[0, 1]) < 0.1


def test_a_window_stays_together():
    lengths = lognormal_lengths(100, longest=700)
    order = shuffled_order(100, 3, 0)
    plan = plan_epoch(lengths, 700, order, seed=3, window_examples=40)
    ids = plan.example_ids.tolist()
    for start in range(0, 100, 40):
        assert sorted(ids[start:start + 40]) == sorted(order[start:start + 40].tolist())


def test_too_long_examples_and_empty_lists_are_refused():
    assert len(planned([4, 9], 9)) == 2
    with pytest.raises(ConfigError, match="example 2 takes 10 positions, more than a row of 9; raise --seq-length"):
        planned([4, 9, 10], 9)
    with pytest.raises(ConfigError, match="no examples to pack"):
        planned(np.empty(0, np.int64), 9)


def test_orders_are_permutations_fixed_for_good():
    assert shuffled_order(10, 1234, 0).tolist() == [8, 1, 6, 2, 0, 3, 5, 7, 4, 9]
    orders = {tuple(shuffled_order(50, seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}
    assert len(orders) == 6 and all(sorted(order) == list(range(50)) for order in orders)


LENGTHS = lognormal_lengths(75, longest=600)


def row_plan(**options):
    return RowPlan(lambda epoch: LENGTHS, 600, **{"seed": 5, **options})


def walk(plan, rows):
    return [(place.epoch, place.example_ids.tolist()) for place in map(plan.locate, rows)]


def test_any_reader_sees_the_same_rows():
    rows = list(range(90))
    whole = walk(row_plan(), rows)
    assert whole[-1][0] >= 2  # it has crossed two epochs
    assert walk(row_plan(), rows[::-1])[::-1] == whole
    for rank in range(3):  # a strided reader, a resumed reader
        assert walk(row_plan(), rows[rank::3]) == whole[rank::3]
    assert walk(row_plan(), rows[61:]) == whole[61:]


def test_every_epoch_is_whole_before_the_next_begins():
    walked = walk(row_plan(), range(90))
    epochs = [epoch for epoch, _ in walked]
    assert epochs == sorted(epochs)
    for epoch in (0, 1):
        ids = [i for e, row in walked if e == epoch for i in row]
        assert sorted(ids) == list(range(75))
    assert [row for e, row in walked if e == 0] != [row for e, row in walked if e == 1][:epochs.count(0)]


def test_seeds_differ_and_unshuffled_plans_keep_windows_in_order():
    assert walk(row_plan(), range(9)) != walk(row_plan(seed=6), range(9))
    ids = row_plan(shuffle=False, window_examples=10).rows_of_epoch(1).example_ids.tolist()
    assert [sorted(ids[i:i + 10]) for i in range(0, 75, 10)] == [list(range(i, min(i + 10, 75)))
                                                                 for i in range(0, 75, 10)]


def test_epochs_may_have_different_examples():
    plan = RowPlan(lambda epoch: LENGTHS[:20 + 10 * epoch], 600, seed=5)
    first, second = len(plan.rows_of_epoch(0)), len(plan.rows_of_epoch(1))
    walked = walk(plan, range(first + second))
    assert sorted(i for e, row in walked if e == 1 for i in row) == list(range(30))
    assert plan.locate(first + second).epoch == 2


def test_a_cached_plan_is_the_same_and_is_not_computed_twice(tmp_path, monkeypatch):
    fresh = walk(row_plan(), range(90))
    assert walk(row_plan(cache_folder=tmp_path / "new" / "cache"), range(90)) == fresh
    folders = sorted(path.name for path in (tmp_path / "new" / "cache").iterdir())
    assert len(folders) == fresh[-1][0] + 1
    monkeypatch.setattr("hrm_megatron.data.plan.plan_epoch", None)
    reopened = row_plan(cache_folder=tmp_path / "new" / "cache")
    assert walk(reopened, range(90)) == fresh
    assert isinstance(reopened.rows_of_epoch(0).example_ids, np.memmap)


@pytest.mark.parametrize("change", [
    dict(seed=6), dict(window_examples=20), dict(shuffle=False), dict(row_tokens=650),
    dict(epoch_lengths=lambda epoch: LENGTHS[::-1]),
])
def test_a_cached_plan_is_used_for_nothing_else(tmp_path, change):
    row_plan(cache_folder=tmp_path).locate(0)
    options = {"epoch_lengths": lambda epoch: LENGTHS, "row_tokens": 600, "seed": 5, **change}
    rows = range(20)
    assert walk(RowPlan(**options, cache_folder=tmp_path), rows) == walk(RowPlan(**options), rows)


def test_a_lost_race_for_the_cache_changes_nothing(tmp_path, monkeypatch):
    def slow_plan(*args, **kwargs):
        rows = plan_epoch(*args, **kwargs)
        monkeypatch.undo()
        row_plan(cache_folder=tmp_path).locate(0)  # the faster process
        return rows
    monkeypatch.setattr("hrm_megatron.data.plan.plan_epoch", slow_plan)
    assert walk(row_plan(cache_folder=tmp_path), [0]) == walk(row_plan(), [0])
    assert len(list(tmp_path.iterdir())) == 1


def test_cache_folders_that_do_not_work_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file.*choose another --data-cache-path"):
        row_plan(cache_folder=tmp_path / "file").locate(0)
    row_plan(cache_folder=tmp_path / "cache").locate(0)
    (kept,) = (tmp_path / "cache").glob("*/example_ids.npy")
    kept.write_bytes(kept.read_bytes()[:-8])
    with pytest.raises(ConfigError, match=f"{kept.parent}: damaged packing plan.*delete that folder"):
        row_plan(cache_folder=tmp_path / "cache").locate(0)


def test_rows_know_their_number():
    rows = Rows(np.array([0, 2, 3]), np.array([4, 1, 7]))
    assert (len(rows), rows[0].tolist(), rows[1].tolist()) == (2, [4, 1], [7])


def test_planning_needs_no_torch_and_no_megatron():
    code = ("import sys, hrm_megatron.data.plan, hrm_megatron.data.sampled, hrm_megatron.data.tokenizer, "
            "hrm_megatron.data.example, hrm_megatron.data.preprocess; print('torch' in sys.modules, 'megatron' in "
            "sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True
                          ).stdout.split() == ["False", "False"]
