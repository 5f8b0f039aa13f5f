import errno
import os
import platform
import shutil
import subprocess
import sys
import threading
from bisect import bisect_left, insort

import numpy as np
import pytest

from hrm_megatron.config import ConfigError
from hrm_megatron.data import folder_lock, plan_cache
from hrm_megatron.data import plan as planning
from hrm_megatron.data.kernels import best_fit, order_between
from hrm_megatron.data.plan import RowPlan, plan_windows, window_for
from hrm_megatron.data.plan_cache import Rows
from hrm_megatron.data.shuffle import stream_key
from tests.damage import zero_in_header
from tests.data.walks import ListWalk, feistel, random_order


def lognormal_lengths(count, mean=200, longest=4096):
    lengths = np.random.default_rng(7).lognormal(np.log(mean) - 0.5, 1.0, count)
    return np.clip(lengths.astype(np.int64), 2, longest)


def rows_of(plan):
    return [plan[i].tolist() for i in range(len(plan))]


def planned(lengths, row_tokens, seed=3, epoch=0, window_examples=None):
    plan = RowPlan(ListWalk(lambda epoch: np.asarray(lengths), seed), row_tokens, seed, window_examples=window_examples)
    return plan.rows_of_epoch(epoch)


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
    row_of, rows = best_fit(np.array([1, 2, 3, 4, 5, 6], np.int32), 10)
    assert row_of.tolist() == [2, 1, 1, 0, 1, 0] and rows == 3


def best_fit_by_definition(lengths, row_tokens):
    """Row of each example: from the longest on, into the row of least room that suffices, the first opened of those."""
    row_of, rooms, opened = np.empty(len(lengths), np.int64), [], 0
    for example in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[example])
        at = bisect_left(rooms, (length, -1))
        room, row = rooms.pop(at) if at < len(rooms) else (row_tokens, opened)
        opened += at == len(rooms) and row == opened
        row_of[example] = row
        insort(rooms, (room - length, row))
    return row_of.tolist()


@pytest.mark.parametrize("count, row_tokens, longest", [
    (1, 1, 1), (2, 5, 5), (40, 17, 17), (200, 64, 64), (3000, 4096, 4096), (3000, 9000, 40), (2000, 4097, 130)])
def test_best_fit_is_its_definition(count, row_tokens, longest):
    """Rooms over one, two and three levels of bits; many rows of one room, and rooms far apart."""
    random = np.random.default_rng(count)
    for lengths in (random.integers(1, longest + 1, count), lognormal_lengths(count, max(2, longest / 9), longest),
                    random.choice([1, longest // 2 + 1, longest], count)):
        lengths = np.clip(lengths, 1, longest).astype(np.int32)
        row_of, rows = best_fit(lengths, row_tokens)
        assert row_of.tolist() == best_fit_by_definition(lengths, row_tokens) and rows == row_of.max() + 1


@pytest.mark.parametrize("mean, row_tokens", [(200, 4096), (900, 4096), (60, 512), (300, 24_576)])
def test_realistic_lengths_fill_the_rows(mean, row_tokens):
    lengths = lognormal_lengths(4 * window_for(row_tokens), mean, min(row_tokens, 4096))
    plan = planned(lengths, row_tokens)
    fill = lengths.sum() / (len(plan) * row_tokens)
    print(f"mean length {mean}, rows of {row_tokens}: {fill:.2%} filled")
    assert fill >= 0.998


def test_long_examples_are_not_bunched():
    lengths = lognormal_lengths(20_000)
    plan = planned(lengths, 4096)
    longest = np.array([lengths[row].max() for row in rows_of(plan)])
    halves = [part.mean() for part in np.array_split(longest, 2)]
    assert abs(halves[0] - halves[1]) < 0.1 * longest.mean()
    assert abs(np.corrcoef(longest[:-1], longest[1:])[0, 1]) < 0.1


def test_a_window_stays_together():
    lengths = lognormal_lengths(100, longest=700)
    order = random_order(100, 3, 0)
    plan = planned(lengths, 700, window_examples=40)
    ids = plan.example_ids.tolist()
    for start in range(0, 100, 40):
        assert sorted(ids[start:start + 40]) == sorted(order[start:start + 40].tolist())


def test_too_long_examples_and_empty_lists_are_refused():
    assert len(planned([4, 9], 9)) == 2
    with pytest.raises(ConfigError, match="example 2 takes 10 positions, more than a row of 9; raise --seq-length"):
        planned([4, 9, 10], 9)
    with pytest.raises(ConfigError, match="no examples to pack"):
        planned(np.empty(0, np.int64), 9)


STREAM_KEY = 0x5F83044CAD3F26A6


def test_orders_are_permutations_fixed_for_good():
    assert stream_key(1234, 0) == STREAM_KEY
    for count in (1, 2, 3, 10, 1000, 2**17 + 1):
        order = random_order(count, 1234, 0)
        assert np.array_equal(np.sort(order), np.arange(count))
        some = sorted({*range(min(count, 20)), *range(0, count, 997), count - 1})
        assert [int(order[i]) for i in some] == [feistel(i, count, int(stream_key(1234, 0))) for i in some]
    some = order_between(2**40, 2**40 + 5, 2**40 + 10**9, stream_key(7))
    assert some.tolist() == [feistel(2**40 + i, 2**40 + 10**9, int(stream_key(7))) for i in range(5)]
    orders = {tuple(random_order(50, seed, epoch)) for seed in (0, 1) for epoch in (0, 1, 2)}
    assert len(orders) == 6


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_every_order_is_as_likely_as_another(count):
    """Pearson's chi squared over all permutations of a few numbers, where a Feistel network is weakest."""
    keys = 6000 * count
    seen = np.zeros(count**count, np.int64)
    for key in range(keys):
        seen[int(order_between(0, count, count, np.uint64(key * 2**40 + 1)) @ count ** np.arange(count))] += 1
    seen = seen[seen > 0]
    kinds = int(np.prod(np.arange(1, count + 1)))
    assert len(seen) == kinds
    chi_squared = ((seen - keys / kinds) ** 2).sum() / (keys / kinds)
    # Mean kinds - 1, variance twice that; five standard deviations.
    assert chi_squared < kinds - 1 + 5 * np.sqrt(2 * (kinds - 1)) + 5


LENGTHS = lognormal_lengths(75, longest=600)


def row_plan(epoch_lengths=lambda epoch: LENGTHS, row_tokens=600, seed=5, shuffle=True, **options):
    return RowPlan(ListWalk(epoch_lengths, seed if shuffle else None), row_tokens, seed, **options)


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
    plan = row_plan(lambda epoch: LENGTHS[:20 + 10 * epoch])
    first, second = len(plan.rows_of_epoch(0)), len(plan.rows_of_epoch(1))
    walked = walk(plan, range(first + second))
    assert sorted(i for e, row in walked if e == 1 for i in row) == list(range(30))
    assert plan.locate(first + second).epoch == 2


def test_a_cached_plan_is_the_same_and_is_not_computed_twice(tmp_path, monkeypatch):
    fresh = walk(row_plan(), range(90))
    assert walk(row_plan(cache_folder=tmp_path / "new" / "cache"), range(90)) == fresh
    folders = sorted(path.name for path in (tmp_path / "new" / "cache").iterdir())
    assert len(folders) == fresh[-1][0] + 1
    monkeypatch.setattr(planning, "plan_windows", None)
    reopened = row_plan(cache_folder=tmp_path / "new" / "cache")
    assert walk(reopened, range(90)) == fresh
    assert isinstance(reopened.rows_of_epoch(0).example_ids, np.memmap)


@pytest.mark.parametrize("change", [
    dict(seed=6), dict(window_examples=20), dict(shuffle=False), dict(row_tokens=650),
    dict(epoch_lengths=lambda epoch: LENGTHS[::-1]),
])
def test_a_cached_plan_is_used_for_nothing_else(tmp_path, change):
    row_plan(cache_folder=tmp_path).locate(0)
    rows = range(20)
    assert walk(row_plan(**change, cache_folder=tmp_path), rows) == walk(row_plan(**change), rows)


def test_without_locks_a_lost_race_for_the_cache_changes_nothing(tmp_path, monkeypatch):
    """On a file system that knows no locks, one process of each node plans, and the first to end counts."""
    def unsupported(file, operation):
        raise OSError(errno.EOPNOTSUPP, "no locks here")
    monkeypatch.setattr(folder_lock.fcntl, "flock", unsupported)
    fresh, races, raced = walk(row_plan(), [0]), iter([True]), []

    def slow(*args):
        yield from plan_windows(*args)
        if next(races, False):
            raced.append(walk(row_plan(cache_folder=tmp_path), [0]))  # the faster process
    monkeypatch.setattr(planning, "plan_windows", slow)
    assert walk(row_plan(cache_folder=tmp_path), [0]) == fresh == raced[0]
    assert len(list(tmp_path.iterdir())) == 1


def test_one_plans_and_the_others_wait_for_it(tmp_path, monkeypatch):
    planned_by, may_go_on = [], threading.Event()

    def slow(*args):
        planned_by.append(threading.current_thread())
        may_go_on.wait()
        yield from plan_windows(*args)
    monkeypatch.setattr(planning, "plan_windows", slow)
    monkeypatch.setattr(plan_cache.time, "sleep", lambda seconds: may_go_on.set())  # somebody waits
    found = []
    readers = [threading.Thread(target=lambda: found.append(walk(row_plan(cache_folder=tmp_path), [0])))
               for _ in range(3)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert len(planned_by) == 1 and found == [found[0]] * 3
    assert len(list(tmp_path.iterdir())) == 1


def test_another_takes_over_from_a_planner_that_is_killed(tmp_path):
    code = ("import os, sys\nimport numpy as np\nfrom hrm_megatron.data import plan\nfrom tests.data import test_plan\n"
            "windows = plan.plan_windows\ndef killed(*args):\n  for window in windows(*args):\n    yield window\n"
            "    os.kill(os.getpid(), 9)\nplan.plan_windows = killed\n"
            "test_plan.row_plan(cache_folder=sys.argv[1], window_examples=20).locate(0)")
    killed = subprocess.run([sys.executable, "-c", code, tmp_path])
    assert killed.returncode == -9 and len(list(tmp_path.iterdir())) == 2  # a lock, and a part of a plan
    assert walk(row_plan(cache_folder=tmp_path, window_examples=20), [0]) == walk(row_plan(window_examples=20), [0])
    assert len(list(tmp_path.iterdir())) == 1


def test_where_locks_are_a_nodes_own_none_deletes_what_another_writes(tmp_path, monkeypatch):
    begun, written = threading.Event(), threading.Event()

    def windows(*args):
        yield from plan_windows(*args)
        if threading.current_thread() is other:
            begun.set()
            written.wait()
        else:
            other.start()
            begun.wait()
    monkeypatch.setattr(folder_lock.fcntl, "flock", lambda file, operation: None)
    monkeypatch.setattr(planning, "plan_windows", windows)
    other = threading.Thread(target=lambda: row_plan(cache_folder=tmp_path).locate(0))
    try:
        assert len(walk(row_plan(cache_folder=tmp_path), [0])) == 1
    finally:
        written.set()
        other.join()
    assert len(list(tmp_path.iterdir())) == 1


def test_what_vanishes_while_it_is_written_is_planned_once_more(tmp_path, monkeypatch):
    fresh, partials = walk(row_plan(), [0]), []

    def windows(*args):
        yield from plan_windows(*args)
        if not partials:
            partials.extend(tmp_path.glob("*.partial-*"))
            shutil.rmtree(partials[0])
    monkeypatch.setattr(planning, "plan_windows", windows)
    assert walk(row_plan(cache_folder=tmp_path), [0]) == fresh and len(partials) == 1


def test_only_what_is_known_to_be_left_is_deleted(tmp_path):
    row_plan(cache_folder=tmp_path).locate(0)
    [name] = [path.name for path in tmp_path.iterdir()]
    ended = subprocess.Popen(["true"])
    ended.wait()
    writers = {"ended": f"{platform.node()}-{ended.pid}-0a", "at it": f"{platform.node()}-{os.getpid()}-0b",
               "of an older process of that number": f"{platform.node()}-1-0f",
               "elsewhere": f"another-host-{ended.pid}-0c", "elsewhere, long ago": "another-host-7-0d",
               "of an older version": "0e"}
    partials = {what: tmp_path / f"{name}.partial-{writer}" for what, writer in writers.items()}
    for partial in partials.values():
        partial.mkdir()
    for what in ("elsewhere, long ago", "of an older process of that number"):
        os.utime(partials[what], (0, 0))
    shutil.rmtree(tmp_path / name)
    row_plan(cache_folder=tmp_path).locate(0)
    assert {what for what, partial in partials.items() if partial.exists()} == {"at it", "elsewhere",
                                                                                "of an older version"}


def test_one_process_of_a_node_locks_and_the_others_look_ever_more_seldom(tmp_path, monkeypatch):
    fresh, pauses = walk(row_plan(), [0]), []

    def sleep(seconds):
        pauses.append(seconds)
        assert not [*tmp_path.iterdir()]
        if len(pauses) == 9:
            with monkeypatch.context() as first:
                first.setenv("LOCAL_RANK", "0")
                row_plan(cache_folder=tmp_path).locate(0)
    monkeypatch.setattr(plan_cache.time, "sleep", sleep)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert walk(row_plan(cache_folder=tmp_path), [0]) == fresh
    assert pauses[0] < 1 < pauses[-1] < 10 and pauses == sorted(pauses)
    monkeypatch.setattr(plan_cache, "PATIENCE_SECONDS", -1.0)  # nobody has planned for so long
    assert walk(row_plan(seed=6, cache_folder=tmp_path), [0]) == walk(row_plan(seed=6), [0]) and len(pauses) == 9


def test_the_next_epoch_is_planned_while_this_one_is_read(tmp_path, monkeypatch):
    fresh = walk(row_plan(), range(90))
    epoch_rows = [epoch for epoch, _ in fresh].count(0)
    plan = row_plan(cache_folder=tmp_path, num_rows=epoch_rows + 1)
    plan.locate(0)
    for thread in threading.enumerate():
        if thread.name == "plan":
            thread.join()
    monkeypatch.setattr(planning, "plan_windows", None)  # nobody plans in this thread any more
    assert walk(plan, range(epoch_rows + 1)) == fresh[:epoch_rows + 1]
    assert len(list(tmp_path.iterdir())) == 2  # num_rows ends in epoch 1: epoch 2 is not planned


def test_no_epoch_is_planned_of_which_no_row_is_read(tmp_path):
    epoch_rows = [epoch for epoch, _ in walk(row_plan(), range(90))].count(0)
    row_plan(cache_folder=tmp_path, num_rows=epoch_rows).locate(0)
    assert all(thread.name != "plan" for thread in threading.enumerate()) and len(list(tmp_path.iterdir())) == 1


def test_a_run_that_goes_on_reads_counts_of_earlier_epochs_only(tmp_path, monkeypatch):
    fresh = walk(row_plan(cache_folder=tmp_path), range(90))
    opened = []
    load = plan_cache._load
    monkeypatch.setattr(planning, "plan_windows", None)
    monkeypatch.setattr(plan_cache.PlanCache, "opened",
                        lambda self, name, plan: opened.append(plan.epoch) or load(self.folder / name))
    assert walk(row_plan(cache_folder=tmp_path), [89]) == fresh[89:]
    assert opened == [fresh[89][0]] and opened[0] >= 2


def test_cache_folders_that_do_not_work_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file.*choose another --data-cache-path"):
        row_plan(cache_folder=tmp_path / "file").locate(0)
    row_plan(cache_folder=tmp_path / "cache").locate(0)
    (kept,) = (tmp_path / "cache").glob("*/example_ids.bin")
    whole = kept.read_bytes()
    kept.write_bytes(whole[:-8])
    with pytest.raises(ConfigError, match=f"{kept.parent}: damaged packing plan.*delete that folder"):
        row_plan(cache_folder=tmp_path / "cache").locate(0)
    kept.write_bytes(whole)
    zero_in_header(kept.with_name("offsets.npy"))
    with pytest.raises(ConfigError, match=f"{kept.parent}: damaged packing plan .*offsets.npy: cannot read.*; delete"):
        row_plan(cache_folder=tmp_path / "cache").locate(0)


def test_rows_know_their_number():
    rows = Rows(np.array([0, 2, 3]), np.array([4, 1, 7]), 9)
    assert (len(rows), rows[0].tolist(), rows[1].tolist()) == (2, [4, 1], [7])


def test_planning_needs_no_torch_and_no_megatron():
    code = ("import sys, hrm_megatron.data.plan, hrm_megatron.data.sampled, hrm_megatron.data.tokenizer, "
            "hrm_megatron.data.example, hrm_megatron.data.preprocess, "
            "hrm_megatron.data.mixture; print('torch' in sys.modules, 'megatron' in "
            "sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True
                          ).stdout.split() == ["False", "False"]
