"""A run whose held-out exact accuracy does not rise any more ends, and its best iteration is kept and named."""
from __future__ import annotations

import argparse
import json
import re
from types import SimpleNamespace

import pytest

from hrm_megatron.checkpoint.folders import complete_iterations, find_iteration, read_run
from hrm_megatron.checkpoint.fsdp_folder import open_run
from hrm_megatron.config import ConfigError
from hrm_megatron.data.tokenizer import TextTokenizer
from hrm_megatron.training.early_stopping import RECORD_FILE, Record, check_early_stopping, stopped_early
from tests.training.conftest import GOLDEN, scalars
from tests.training.test_resume import tensors_that_differ
from tests.training.test_validation import SEED, SPLIT, store  # noqa: F401  # a fixture

# What evaluations shall have measured, by iteration. The second best of 4 is no better than the first.
VALUES = {2: 0.1, 4: 0.3, 6: 0.2, 8: 0.3, 10: 0.25, 12: 0.9}
MEASURED = f"""
import torch
from megatron.training import training
from megatron.training.global_vars import get_args
stock = training.evaluate
def evaluate(*rest, **options):
    means, *others = stock(*rest, **options)
    if means:
        means["exact accuracy"] = torch.tensor({VALUES}[get_args().curr_iteration + 1], dtype=torch.float64)
    return means, *others
training.evaluate = evaluate
"""
STOPPED = "the best is iteration 4 with 30.0% exact: "


@pytest.fixture
def train(launch, store):  # noqa: F811
    def train(folder, *flags, ranks=1, prelude=MEASURED):
        run = launch("--data-path", store, "--split", SPLIT, "--tokenizer-model", GOLDEN / "tokenizer", "--seed", SEED,
                     "--num-layers", 2, "--hidden-size", 16, "--num-attention-heads", 2, "--seq-length", 64,
                     "--global-batch-size", 4, "--micro-batch-size", 2, "--train-iters", 12, "--lr", 2e-2,
                     "--eval-interval", 2, "--eval-iters", 1, "--log-interval", 1, "--early-stopping", 3,
                     "--save", folder, "--load", folder, *flags, prelude=prelude, ranks=ranks)
        assert run.code == 0, run.output[-3000:]
        return run.output
    return train


def record(folder):
    found = json.loads((folder / RECORD_FILE).read_text())
    return found["best_iteration"], found["stopped"], {int(i): value for i, value in found["evaluations"].items()}


UNTIL_STOPPED = {i: value for i, value in VALUES.items() if i <= 10}


def test_it_stops_and_a_resumed_run_stops_where_the_other_did(train, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    said = train(whole, "--tensorboard-dir", whole / "log")
    assert f"early stopping: 3 evaluations without a better one, stopped at step 10; {STOPPED}{whole}" in said
    assert record(whole) == (4, 10, UNTIL_STOPPED)
    assert complete_iterations(whole) == [f"iter_{i:07d}" for i in (2, 4, 10)]  # each best, and the last
    assert max(scalars(whole / "log")) == 10

    train(halves, "--exit-interval", 6)
    assert record(halves) == (4, None, {i: VALUES[i] for i in (2, 4, 6)})
    elsewhere = train(tmp_path / "b", "--load", halves, "--exit-interval", 8)
    assert f"counts the evaluations in {tmp_path / 'b'} alone; those before are in {halves / RECORD_FILE}" in elsewhere
    assert record(tmp_path / "b") == (8, None, {8: VALUES[8]})
    train(halves)
    assert record(halves) == record(whole)
    assert not tensors_that_differ(find_iteration(halves), find_iteration(whole))
    assert f"stopped early at iteration 10, nothing to train; {STOPPED}{halves}" in train(halves)
    more = train(halves, "--early-stopping", 9)  # who asks for more gets it
    assert f"early stopping: the best is iteration 12 with 90.0% exact: {halves}" in more
    assert len(re.findall(r"step 12/12 +saved in", more)) == 1  # a second save would begin by breaking the first
    assert record(halves)[:2] == (12, None)


KILLED_BEHIND_THE_SAVE = MEASURED + """
import os
from hrm_megatron.training import guarded_saves
deleting = guarded_saves.delete_older
def delete_older(args, latest):
    deleting(args, latest)
    if latest == LATEST:
        os._exit(9)
guarded_saves.delete_older = delete_older
"""


def test_a_kill_right_behind_a_save_forgets_no_evaluation(train, tmp_path):
    """The save of the best, and then that of the end, is the last thing; a start goes on as if nothing had happened."""
    saves = "--save-interval", 2, "--most-recent-k", 1
    train(tmp_path / "whole", *saves)
    for latest, stopped in ((4, None), (10, 10)):
        with pytest.raises(AssertionError):
            train(tmp_path / "killed", *saves, prelude=KILLED_BEHIND_THE_SAVE.replace("LATEST", str(latest)))
        assert find_iteration(tmp_path / "killed").name == f"iter_{latest:07d}"
        assert record(tmp_path / "killed") == (4, stopped, {i: VALUES[i] for i in VALUES if i <= latest})
    assert "stopped early at iteration 10, nothing to train" in train(tmp_path / "killed", *saves)
    assert record(tmp_path / "killed") == record(tmp_path / "whole")
    assert complete_iterations(tmp_path / "killed") == ["iter_0000004", "iter_0000010"]


def test_accuracies_on_other_examples_are_not_compared(tmp_path):
    args = argparse.Namespace(save=str(tmp_path), eval_weights="raw", data_digests=dict(train="a", valid="b"))
    measured = Record.read(args, 0)
    measured.evaluations[1] = 0.5
    measured.write(tmp_path)
    args.data_digests = dict(train="c", valid="b")
    assert Record.read(args, 1) == measured
    args.data_digests["valid"] = "c"
    with pytest.raises(ConfigError, match=f"{RECORD_FILE}: has accuracies on other examples than those to validate on"):
        Record.read(args, 1)
    args.data_digests = {}  # of a dry run without data
    assert Record.read(args, 1).evaluations == {1: 0.5}


OUT_OF_TIME = MEASURED + """
measured = training.evaluate
def evaluate(*rest, **options):
    if get_args().curr_iteration + 1 == 4:
        training._TRAIN_START_TIME = 0.0
    return measured(*rest, **options)
training.evaluate = evaluate
"""


def test_time_that_is_out_in_an_evaluation_changes_no_later_one(train, tmp_path):
    """It comes to its end, so that the next start goes on where one without a limit would be."""
    flags = "--eval-iters", 2, "--tensorboard-dir"
    train(tmp_path / "whole", *flags, tmp_path / "whole")
    limited = [tmp_path / "limited", *flags, tmp_path / "limited", "--exit-duration-in-mins", 1_000_000]
    train(*limited, prelude=OUT_OF_TIME)
    assert record(tmp_path / "limited") == (4, None, {i: VALUES[i] for i in (2, 4)})
    args = read_run(open_run(find_iteration(tmp_path / "limited")))[0]["args"]
    assert args.consumed_valid_samples == 2 * 2 * 4  # evaluations, iterations, rows
    assert args.vocabulary == TextTokenizer(GOLDEN / "tokenizer").vocabulary
    train(*limited)
    assert record(tmp_path / "limited") == record(tmp_path / "whole") == (4, 10, UNTIL_STOPPED)
    curves = [scalars(tmp_path / name, "lm loss validation") for name in ("limited", "whole")]
    assert curves[0] == curves[1] and curves[0].keys() == UNTIL_STOPPED.keys()


@pytest.mark.ranks
@pytest.mark.parametrize("layout", [["--pipeline-model-parallel-size", 2], []])
def test_all_ranks_stop_together(train, tmp_path, layout):
    train(tmp_path, *layout, ranks=2)
    assert record(tmp_path) == (4, 10, UNTIL_STOPPED)


def test_retention_keeps_the_best_and_no_former_best(train, tmp_path):
    train(tmp_path, "--save-interval", 2, "--save-retain-interval", 100)
    assert record(tmp_path)[:2] == (4, 10)
    assert complete_iterations(tmp_path) == ["iter_0000004", "iter_0000010"]


def test_what_was_measured_behind_the_iteration_that_is_resumed_does_not_count(tmp_path):
    args = argparse.Namespace(save=tmp_path, eval_weights="raw")
    Record("raw", None, {1: 0.5, 2: float("nan"), 3: 0.7}, stopped=3).write(tmp_path)
    assert Record.read(args, 3).best == 3 and Record.read(args, 3).stopped == 3
    earlier = Record.read(args, 2)
    assert (earlier.best, earlier.evaluations_since_best, earlier.stopped) == (1, 1, None)
    assert Record.read(argparse.Namespace(save=tmp_path / "none", eval_weights="raw"), 3).best is None
    (tmp_path / RECORD_FILE).write_text("{")
    with pytest.raises(ConfigError, match=f"{RECORD_FILE}: cannot read what was measured .* remove it"):
        Record.read(args, 3)


@pytest.mark.parametrize("before, now", [("raw", "ema"), ("raw", "both"), ("ema", "raw"), ("both", "raw")])
def test_accuracies_of_other_weights_are_not_compared(tmp_path, before, now):
    args = argparse.Namespace(early_stopping=2, save=str(tmp_path), load=None, async_save=False, skip_train=False,
                              eval_weights=before)
    measured = Record.read(args, 0)
    measured.evaluations[1] = 0.5
    measured.write(tmp_path)
    assert Record.read(args, 1) == measured  # "both" judges as "ema" does
    args.eval_weights = now
    said = f"{RECORD_FILE} has accuracies of the {measured.weights} ones; give --eval-weights {measured.weights}, or"
    with pytest.raises(ConfigError, match=f"--eval-weights {now}: .*{said}"):
        check_early_stopping(args, SimpleNamespace(validates=True))


@pytest.mark.parametrize("changes, validates, said", [
    (dict(save=None), True, "--early-stopping 2: has no effect without --save"),
    (dict(async_save=True), True, "--early-stopping 2 is incompatible with --async-save"),
    ({}, False, "--early-stopping 2: there is nothing to validate on"),
])
def test_what_makes_no_sense_is_one_line(changes, validates, said):
    args = argparse.Namespace(**dict(
        early_stopping=2, save="runs/a", load=None, async_save=False, skip_train=False, eval_weights="raw") | changes)
    with pytest.raises(ConfigError, match=said):
        check_early_stopping(args, SimpleNamespace(validates=validates))
    assert stopped_early(args, 10) is None
