"""What the command line names as data, and where planned rows are kept."""
import argparse
import logging
import shutil

import numpy as np
import pytest

from hrm_megatron.config import ConfigError
from hrm_megatron.data import plan_cache
from hrm_megatron.data.indexed_examples import IndexedExamplesWriter
from hrm_megatron.data.split import example_parts
from hrm_megatron.training import data
from hrm_megatron.training.data import open_sources, plan_folder
from hrm_megatron.training.resume import CHANGEABLE, changes, trains_on_the_same
from tests.training.conftest import FULLBATCH, GOLDEN

NAMED = dict.fromkeys(CHANGEABLE)  # by two runs alike


class FakeTokenizer:
    fingerprint, boq, eoq, eoa, vocab_size = "f" * 64, 6, 7, 11, 300


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    for name, count in (("a", 40), ("b", 90)):
        with IndexedExamplesWriter(folder / name, FakeTokenizer()) as writer:
            for i in range(count):
                writer.add(np.array([6, 100 + i, 7]), np.array([60] * (i % 3) + [11]))
    return folder


def arguments(**given):
    return argparse.Namespace(**{"data_path": None, "train_data_path": None, "valid_data_path": None,
                                 "test_data_path": None, "sampled_data_path": None, "sampling_rules": None,
                                 "tokenizer_model": None, "skip_train": False, "split": "97,3,0", "seed": 3,
                                 "seq_length": 20, "data_cache_path": None, "save": None, "verify_data": False,
                                 "dry_run": False} | given)


def shares(walk, epochs=4):
    """Positions that each dataset has in some epochs, and all that the walk knows of sizes."""
    found = np.zeros(len(walk.stores))
    for epoch in range(epochs):
        loaded = walk.epoch(epoch)
        window = loaded.window(0, len(loaded))
        found += np.bincount(np.searchsorted(walk.first, window.ids, "right") - 1, window.lengths, len(walk.stores))
    return found / found.sum()


def test_one_prefix_several_and_weighted_ones(stores):
    a, b = str(stores / "a"), str(stores / "b")
    one, both, weighted = (open_sources(arguments(data_path=paths)) for paths in ([a], [a, b], ["3", a, "1.0", b]))
    assert [len(sources.stores) for sources in (one, both, weighted)] == [1, 2, 2]
    assert shares(both.train) == pytest.approx([40 / 130, 90 / 130], abs=0.02)  # the validation part is small
    assert shares(weighted.train) == pytest.approx([0.75, 0.25], abs=0.02)  # an example is a tenth of a percent
    held_out = sum((example_parts(len(store), "97,3,0", 3, store.prompt_keys()) == 1).sum() for store in both.stores)
    assert both.held_out() == weighted.held_out() == (held_out, 0) and held_out
    parts = open_sources(arguments(train_data_path=["0.3", a, "0.7", b], valid_data_path=[b]))
    assert parts.held_out() == (90, 0) and shares(parts.train) == pytest.approx([0.3, 0.7], abs=0.02)


@pytest.mark.parametrize("given, said", [
    (dict(data_path=["0.3", "{a}", "b", "{b}"]), "some have a weight before them and some not"),
    (dict(data_path=["0", "{a}", "1", "{b}"]), "weight 0 is not above 0; leave that dataset out"),
    (dict(data_path=["nan", "{a}", "1", "{b}"]), "weight nan is not above 0"),
    (dict(data_path=["1", "{a}", "1", "{a}"]), "/a is there twice; raise its weight"),
    (dict(data_path=["{a}", "{a}/../a"]), "/a is there twice, also as "),
    (dict(data_path=["{a}", "{a}x"]), "ax.json missing"),
    (dict(data_path=["{a}"], valid_data_path=["{b}"]), "--data-path is incompatible with --valid-data-path"),
    (dict(sampled_data_path=str(GOLDEN / "sampled"), sampling_rules="r"), "a sampled folder has been sampled"),
    (dict(data_path=["1", "{a}", "1", "{b}"], sampling_rules="r"), "incompatible with the weights of --data-path"),
    (dict(data_path=["{a}"], sampling_rules="/no/rules.yaml"), "/no/rules.yaml: No such file"),
])
def test_data_that_cannot_be_meant_is_refused(stores, given, said):
    named = {name: [path.format(a=stores / "a", b=stores / "b") for path in value] if isinstance(value, list) else value
             for name, value in given.items()}
    with pytest.raises(ConfigError, match=said) as refusal:
        open_sources(arguments(**named))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("change, reads, seen", [
    ("a token", 1, True), ("places in epoch 1", 2, True), ("places in epoch 1", 1, False), ("fewer epochs", 24, True),
    ("fewer epochs", 23, False), ("more epochs", 25, True), ("more epochs", 24, False), ("metadata", 30, False)])
@pytest.mark.parametrize("unit", ["epochs", "train_iters"])
def test_other_data_in_a_sampled_folder_are_seen_where_a_run_reads_them(tmp_path, change, reads, seen, unit):
    """Of the 24 epochs that are stored, each of 8 rows of 96 positions."""
    folder = shutil.copytree(FULLBATCH / "sampled", tmp_path / "sampled")
    given = NAMED | dict(epochs=None, global_batch_size=8, seq_length=96) | {unit: reads}

    def opened(path):
        open_sources(args := argparse.Namespace(**vars(arguments(sampled_data_path=str(path))) | given))
        return args
    theirs = opened(folder)
    assert opened(shutil.copytree(folder, tmp_path / "elsewhere")).data_digests == theirs.data_digests
    if change == "fewer epochs":
        shutil.rmtree(folder / "epoch_23")
    elif change == "more epochs":
        shutil.copytree(folder / "epoch_1", folder / "epoch_24")
    elif change == "metadata":
        (folder / "metadata.json").write_text((folder / "metadata.json").read_text() + " ")
    else:
        place = folder / ("tokens.npy" if change == "a token" else "epoch_1/inst_start.npy")
        array = np.load(place)
        array[3] = array[4]
        np.save(place, array)
    ours = opened(folder)
    assert trains_on_the_same(theirs, ours) is not seen
    assert (changes(theirs, ours) or "")[:41] == ("the data are not those it was trained on:" if seen else "")
    for part in ("tokens", "epochs"):  # of an older version, which knew the lengths alone
        del theirs.data_digests[part]
    assert changes(theirs, ours) is None and trains_on_the_same(theirs, ours)


def test_rows_of_large_data_are_kept_beside_it_or_where_it_can_be_written(stores, tmp_path, monkeypatch, caplog):
    walk = open_sources(arguments(data_path=[str(stores / "a")])).train
    assert plan_folder(arguments(), walk) is None  # small data is planned by each process
    assert plan_folder(arguments(data_cache_path="c"), walk) == data.Path("c")
    assert plan_folder(arguments(data_cache_path="c", dry_run=True), walk) is None
    monkeypatch.setattr(data, "CACHED_EXAMPLES", 10)
    assert plan_folder(arguments(), walk) == stores / "a.rows"
    access, own = plan_cache.os.access, tmp_path / "tmp"
    monkeypatch.setattr(plan_cache.os, "access", lambda path, mode: path != stores and access(path, mode))
    monkeypatch.setattr(plan_cache.tempfile, "gettempdir", lambda: str(own))
    with caplog.at_level(logging.INFO):
        assert plan_folder(arguments(save=tmp_path / "run"), walk) == tmp_path / "run" / "rows"
        assert plan_folder(arguments(), walk).is_relative_to(own)
    assert [f"{stores}/a.rows cannot be written: planned rows are kept in {tmp_path}" in line
            for line in caplog.messages] == [True, True]
