"""--log-loss-by-source: a label counts for the source of its example, on every rank and in every layout."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hrm_megatron.attention.balance import balanced_order
from hrm_megatron.data.batch import PackedBatch
from hrm_megatron.data.dataset import PackedRows
from hrm_megatron.data.indexed_examples import IndexedExamples
from hrm_megatron.data.mixture import Mixture, Selection, SourceNames
from hrm_megatron.parallel.context import context_positions
from hrm_megatron.training import source_losses
from hrm_megatron.training.source_losses import SourceLosses
from tests.data.listed_store import ListedStore
from tests.stores import FakeTokenizer, write_store
from tests.training.conftest import open_log, scalars
from tests.training.test_layouts import CP, PP, TP

ROW_TOKENS = 24
OF_B = 100  # and above: token ids that only the second dataset has


@pytest.fixture(scope="module")
def prefixes(tmp_path_factory):
    """Two datasets whose tokens are not the same."""
    rng, folder = np.random.default_rng(8), tmp_path_factory.mktemp("stores")
    for name, low in (("a", 20), ("b", OF_B)):
        write_store(folder / name, [(rng.integers(low, low + 50, rng.integers(1, 6)),
                                     rng.integers(low, low + 50, rng.integers(1, 7))) for _ in range(40)],
                    FakeTokenizer(200))
    return [folder / name for name in "ab"]


def stacked(rows):
    return PackedBatch.from_rows({name: torch.stack([row[name] for row in rows]) for name in rows[0]})


def test_a_label_counts_for_the_source_of_its_example(prefixes):
    mixture = Mixture([IndexedExamples(prefix) for prefix in prefixes], ROW_TOKENS, Selection(seed=3))
    rows = PackedRows(mixture, ROW_TOKENS, 3, 12)
    sources = mixture.source_names(9)
    assert sources.names == ("a/a", "b/b")
    plain = [rows[i] for i in range(12)]
    rows.source_of = sources
    told = [rows[i] for i in range(12)]
    assert all(torch.equal(one[name], other[name]) for one, other in zip(plain, told, strict=True) for name in one)

    measured = True
    whole, cut = (SourceLosses(sources, lambda: measured) for _ in range(2))
    expected = {0: [], 1: []}
    generator = torch.Generator().manual_seed(5)
    for first in range(0, 12, 2):
        batch = stacked(told[first:first + 2])
        assert stacked(plain[first:first + 2]).example_source is None
        loss_of = torch.rand(200, generator=generator)  # by token, so that a label has the same one wherever it lies
        whole.add(batch, loss_of[batch.flat_labels])
        for label in batch.flat_labels.tolist():
            expected[int(label >= OF_B)].append(loss_of[label].item())
        laid = batch.in_order([balanced_order(pairs, ROW_TOKENS, 2) for pairs in batch.lengths])
        for rank in range(2):
            part = laid.on_context_rank(context_positions(ROW_TOKENS, rank, 2))
            cut.add(part, loss_of[part.flat_labels])
    measured = False
    whole.add(batch, loss_of[batch.flat_labels])
    means = {f"loss by source/{name}": np.mean(expected[number]) for number, name in enumerate(sources.names)}
    assert whole.take(None) == pytest.approx(means, rel=1e-12) == cut.take(None)
    assert whole.take(None) == {}


def test_sources_are_named_until_they_are_too_many(prefixes):
    mixture = Mixture([IndexedExamples(prefix) for prefix in prefixes], ROW_TOKENS)
    assert [mixture.source_names(most=1)(i) for i in (0, 39, 40, 79)] == [0, 0, 1, 1]
    assert mixture.source_names(most=1).names == ("a", "b")
    twins = [ListedStore(prefixes[0].parent / name / "data", ["p"], [3], [2]) for name in ("en", "de")]
    assert Mixture(twins, ROW_TOKENS).source_names(most=1).names == ("en/data/x", "de/data/x")
    alone = Mixture([IndexedExamples(prefixes[1])], ROW_TOKENS)
    assert alone.source_names(most=9).names == ("b",)
    names = SourceNames([("x", 0), ("empty", 5), ("y", 5), ("x", 9)])  # two files of one name are one source
    assert [names.names[names(i)] for i in (0, 4, 5, 8, 9)] == ["x", "x", "y", "y", "x"]


def test_a_run_says_that_sources_are_too_many(prefixes, monkeypatch, caplog):
    mixture = Mixture([IndexedExamples(prefix) for prefix in prefixes], ROW_TOKENS)
    args = SimpleNamespace(log_loss_by_source=True)
    with caplog.at_level("INFO"):
        assert source_losses.find_sources(args, mixture).names == ("a/a", "b/b") and not caplog.messages
        monkeypatch.setattr(source_losses, "MOST_CURVES", 1)
        assert source_losses.find_sources(args, mixture).names == ("a", "b")
    assert caplog.messages == ["data: losses are written for each dataset: 2 sources would be more than 1 curves"]


@pytest.mark.slow
@pytest.mark.ranks
def test_layouts_agree_on_the_loss_of_each_source(launch, prefixes, tmp_path):
    def train(name, ranks, *flags):
        run = launch("--train-data-path", *prefixes, "--num-layers", 2, "--hidden-size", 32, "--num-attention-heads", 2,
                     "--seq-length", ROW_TOKENS, "--global-batch-size", 4, "--micro-batch-size", 2, "--train-iters", 4,
                     "--lr", 1e-2, "--eval-iters", 0, "--log-interval", 2, "--tensorboard-log-interval", 2,
                     "--tensorboard-dir", tmp_path / name, "--log-loss-by-source", *flags, ranks=ranks)
        assert run.code == 0, run.output[-3000:]
        return [scalars(tmp_path / name, f"loss by source/{source}") for source in ("a/a", "b/b")]
    one = train("one", 1)
    assert [curve.keys() for curve in one] == [{2, 4}] * 2 and one[0] != one[1]
    for name, ranks, flags in (("DP 2", 2, []), ("CP 2", 2, [CP, 2]), ("PP 2", 2, [PP, 2]),
                               ("TP 2 x PP 2 + SP", 4, [TP, 2, PP, 2, "--sequence-parallel"])):
        for found, expected in zip(train(name, ranks, *flags), one, strict=True):
            assert found == pytest.approx(expected, abs=1e-5), name  # four steps of rounding at this rate
    assert "loss by source/a/a" in open_log(tmp_path / "one").Tags()["scalars"]
