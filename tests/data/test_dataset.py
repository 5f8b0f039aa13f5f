import pickle
import shutil

import numpy as np
import pytest
import torch

from hrm_megatron.config import ConfigError
from hrm_megatron.data.batch import PackedBatch
from hrm_megatron.data.dataset import PackedRows
from hrm_megatron.data.indexed_examples import IndexedExamples, IndexedExamplesWriter
from hrm_megatron.data.sampled import SampledFolder
from tests.stores import split_examples


class FakeTokenizer:
    fingerprint, boq, eoq, eoa, vocab_size = "f" * 64, 6, 7, 11, 300


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """23 examples; the second prefix token of example i is 100 + i; some targets are one token long."""
    prefix = tmp_path_factory.mktemp("store") / "x"
    with IndexedExamplesWriter(prefix, FakeTokenizer()) as writer:
        for i in range(23):
            writer.add(np.array([6, 100 + i] + [50] * (i % 5) + [7]), np.array([60] * (i * 7 % 9) + [11]))
    return IndexedExamples(prefix)


def examples_in(row):
    tokens, positions = row["tokens"].tolist(), row["position_ids"].tolist()
    return [token - 100 for token, position in zip(tokens, positions, strict=True) if position == 1 and token]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_one_epoch_of_rows_holds_every_example_once(store):
    rows = PackedRows(store, 29, seed=1, num_rows=200)
    seen = sorted(i for row in range(rows.rows_per_epoch) for i in examples_in(rows[row]))
    assert seen == list(range(23))


def test_rows_hold_the_ids_of_the_store(store):
    rows = PackedRows(store, 29, seed=1, num_rows=7)
    for row in range(7):
        batch = PackedBatch.from_rows({name: tensor[None] for name, tensor in rows[row].items()})
        lengths = [(len(prefix), len(target) - 1) for prefix, target in map(store.__getitem__, examples_in(rows[row]))]
        assert list(batch.lengths[0]) == lengths
        targets = np.concatenate([store[i][1] for i in examples_in(rows[row])])
        assert batch.flat_labels.tolist() == targets.tolist()


def test_examples_with_one_target_token_have_a_label(store):
    single = [i for i in range(23) if len(store[i][1]) == 1]
    assert len(single) == 3
    row = PackedRows(store, 29, seed=1, num_rows=1, example_ids=np.array(single[1:2]))[0]
    assert row["prefix_lengths"].tolist()[:2] == [len(store[single[1]][0]), 0]
    assert row["response_lengths"].tolist() == [0] * 29
    assert row["labels"][row["labels"] != -100].tolist() == [11]


def test_training_walks_on_and_fixed_rows_repeat(store):
    walking, fixed = (PackedRows(store, 29, seed=1, num_rows=40, fixed=fixed) for fixed in (False, True))
    n = walking.rows_per_epoch
    assert all(same(walking[i], fixed[i]) for i in range(n))
    assert all(same(fixed[i], fixed[i + n]) and same(fixed[i], fixed[i + 2 * n]) for i in range(n))
    assert not all(same(walking[i], walking[i + n]) for i in range(n))


def test_a_period_shows_every_example_once_wherever_it_begins(store):
    rows = PackedRows(store, 29, seed=1, num_rows=60, fixed=True)
    rows.period = rows.rows_per_epoch + 2
    for first in (0, 3, rows.rows_per_epoch, rows.period + 1):
        window = [rows[first + i] for i in range(rows.period)]
        assert sorted(i for row in window for i in examples_in(row)) == list(range(len(store)))
        empty = [row for row in window if not row["prefix_lengths"].any()]
        assert len(empty) == 2 and all((row["labels"] == -100).all() for row in empty)


def test_rows_outside_are_refused_and_iteration_ends(store):
    rows = PackedRows(store, 29, seed=1, num_rows=5)
    assert len(rows) == len(list(rows)) == 5
    for row in (-1, 5):
        with pytest.raises(IndexError):
            rows[row]


def test_a_reader_process_gets_the_same_rows(store, golden, tmp_path):
    for source, row_tokens in ((store, 29), (SampledFolder(golden / "sampled"), 96)):
        rows = PackedRows(source, row_tokens, seed=1, num_rows=9, cache_folder=tmp_path)
        copy = pickle.loads(pickle.dumps(rows))
        assert all(same(rows[i], copy[i]) for i in range(9))


def test_a_sampled_folder_keeps_its_epochs(golden):
    folder = SampledFolder(golden / "sampled")
    rows = PackedRows(folder, 96, seed=1, num_rows=500)
    for epoch in (0, 1, 2):
        ids = rows.plan.rows_of_epoch(epoch).example_ids
        assert sorted(ids) == list(range(206))
    totals = [0, 0]
    for row in range(rows.rows_per_epoch + len(rows.plan.rows_of_epoch(1))):
        totals[rows.plan.locate(row).epoch] += int((rows[row]["labels"] != -100).sum())
    assert totals == [int(folder.epoch_lengths(epoch)[1].sum()) for epoch in (0, 1)]


def test_rows_too_short_for_an_example_are_refused_at_once(store, golden):
    longest = int((store.lengths()[0] + store.lengths()[1] - 1).max())
    PackedRows(store, longest, seed=1, num_rows=1)
    with pytest.raises(ConfigError, match=f"takes {longest} positions, more than a row of {longest - 1}"):
        PackedRows(store, longest - 1, seed=1, num_rows=1)
    with pytest.raises(ConfigError, match="takes 48 positions, more than a row of 47"):
        PackedRows(SampledFolder(golden / "sampled"), 47, seed=1, num_rows=1)


def test_a_late_epoch_is_checked_at_once_too(golden, monkeypatch):
    folder = SampledFolder(golden / "sampled")
    monkeypatch.setattr(folder, "epoch_lengths", lambda epoch: (np.array([4, 4 + 3 * epoch]), np.array([2, 2])))
    PackedRows(folder, 8, seed=1, num_rows=1)
    with pytest.raises(ConfigError, match="example 1 takes 8 positions, more than a row of 7"):
        PackedRows(folder, 7, seed=1, num_rows=1)


def test_describe(store):
    rows = PackedRows(store, 29, seed=1, num_rows=5, example_ids=np.arange(3, 9))
    used = sum(int((rows[i]["prefix_lengths"] + rows[i]["response_lengths"]).sum()) for i in range(rows.rows_per_epoch))
    fill = used / (29 * rows.rows_per_epoch)
    assert rows.describe() == f"6 examples, {rows.rows_per_epoch} rows of 29 tokens per epoch, {fill:.1%} filled"


def test_held_out_examples_never_occur_in_training(store):
    split = split_examples(len(store), "70,20,10", seed=4)
    assert sorted(np.concatenate(split)) == list(range(23))
    assert [len(part) for part in split] == [17, 4, 2]
    for name, part in split._asdict().items():
        rows = PackedRows(store, 29, seed=1, num_rows=30, example_ids=part, fixed=name != "train")
        assert {i for row in range(30) for i in examples_in(rows[row])} == set(part.tolist())


@pytest.mark.parametrize("count, split, sizes", [
    (1000, "969,30,1", [969, 30, 1]), (10, "969,30,1", [8, 1, 1]), (7, "1", [7, 0, 0]), (7, "0.5,0.5", [4, 3, 0]),
    (2, "98,1,1", [1, 1, 0]), (5, "0,1,0", [0, 5, 0]), (0, "1,1,1", [0, 0, 0]),
])
def test_split_sizes(count, split, sizes):
    assert [len(part) for part in split_examples(count, split, 3)] == sizes


def test_splits_follow_the_seed_only():
    first, again, other = (split_examples(90, "5,4,0", seed) for seed in (1, 1, 2))
    assert np.array_equal(first.train, again.train) and not np.array_equal(first.train, other.train)


@pytest.mark.parametrize("split", ["", "a,b", "1,2,3,4", "0,0,0", "-1,2,3", "nan,1,1"])
def test_meaningless_splits_are_refused(split):
    with pytest.raises(ConfigError, match="97,3,0") as refusal:
        split_examples(9, split, 3)
    assert repr(split) in str(refusal.value)


def test_an_empty_part_is_refused(store):
    with pytest.raises(ConfigError, match="no examples to pack in part .*--split"):
        PackedRows(store, 29, seed=1, num_rows=1, example_ids=split_examples(23, "1,0,0", 3).test)


@pytest.fixture
def unscanned(golden, tmp_path, monkeypatch):
    """A store and a sampled folder, too large to be scanned, with one id outside: (source, row tokens, message)."""
    for module in ("indexed_examples", "sampled"):
        monkeypatch.setattr(f"hrm_megatron.data.{module}.SCANNED_BYTES", 0)
    with IndexedExamplesWriter(tmp_path / "x", FakeTokenizer()) as writer:
        for i in range(9):
            writer.add(np.array([6, 100 + i, 7]), np.array([60, 300 if i == 5 else 61, 11]))
    folder = shutil.copytree(golden / "sampled", tmp_path / "sampled")
    start = int(np.load(folder / "epoch_0" / "resp_start.npy")[17])
    tokens = np.load(folder / "tokens.npy")
    tokens[start] = 250
    np.save(folder / "tokens.npy", tokens)
    return [(IndexedExamples(tmp_path / "x"), 11,
             f"{tmp_path}/x, example 5: token 1 of its target has the id 300, but"),
            (SampledFolder(folder), 96, "token 0 of its target has the id 250, but the vocabulary has 250 entries")]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_id_outside_the_vocabulary_is_refused_when_its_row_is_assembled(unscanned, workers):
    for source, row_tokens, message in unscanned:
        ids = np.array([3, 5, 7, 8]) if isinstance(source, IndexedExamples) else None
        rows = PackedRows(source, row_tokens, seed=1, num_rows=200, example_ids=ids)
        rows.num_rows = rows.rows_per_epoch
        with pytest.raises(ConfigError) as refusal:
            for _ in torch.utils.data.DataLoader(rows, num_workers=workers):
                pass
        assert message in str(refusal.value) and len(str(refusal.value).splitlines()) == 1, refusal.value
