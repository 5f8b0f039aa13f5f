"""A run that ended behind its last save and before its last evaluation is evaluated by the next start, once."""
import json

import pytest

from hrm_megatron.checkpoint.folders import complete_iterations
from hrm_megatron.training.evaluation import EVALUATED
from tests.training.conftest import written
from tests.training.test_validation import MODEL, WHOLE, printed, store  # noqa: F401  # a fixture

STEPS = 4
# Evaluations of a run in order: validation behind its last step, or with BEHIND_ITS_END behind all saves, and the test.
AT_CALL = """
import os, signal
from megatron.training import training
stock, calls = training.evaluate, []
def evaluate(*rest, **options):
    calls.append(0)
    if len(calls) == {call}:
        {act}
    return stock(*rest, **options)
training.evaluate = evaluate
"""
KILL, TERMINATE = "os.kill(os.getpid(), signal.SIGKILL)", "os.kill(os.getpid(), signal.SIGTERM)"
OUT_OF_TIME = "training._TRAIN_START_TIME = 0.0"
LIMIT = "--exit-duration-in-mins", 1_000_000
BEHIND_ITS_END = "--eval-interval", STEPS + 1
MADE_UP, NOTHING = f"iteration {STEPS} of {STEPS} is done; its last evaluation is made up", "nothing to train"


@pytest.fixture(scope="module")
def train(launch, store):  # noqa: F811
    def train(folder, *flags, **options):
        return launch("--data-path", store, *WHOLE, *MODEL, "--global-batch-size", 4, "--train-iters", STEPS, "--lr",
                      2e-2, "--min-lr", 1e-3, "--eval-interval", STEPS, "--save", folder, "--load", folder, *flags,
                      **options)
    return train


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """What a run that comes to its end says of its parts."""
    folder = tmp_path_factory.mktemp("whole")
    run = train(folder)
    assert run.code == 0 and printed(run).keys() == {"validation", "test"}, run.output[-3000:]
    assert json.loads((folder / EVALUATED).read_text()) == {"iteration": STEPS}
    assert run.output.count("  validation: loss ") == 1  # of its last step, which is its end
    assert NOTHING in train(folder).output
    return printed(run)


@pytest.mark.parametrize("code, flags, prelude, ranks", [
    (-9, BEHIND_ITS_END, AT_CALL.format(call=1, act=KILL), 2), (-9, [], AT_CALL.format(call=2, act=KILL), 1),
    (0, ["--exit-signal-handler"], AT_CALL.format(call=1, act=TERMINATE), 1),
    (0, ["--exit-interval", STEPS], "", 1),
], ids=["killed in the validation", "killed in the test", "stopped in the last step", "--exit-interval"])
def test_the_last_evaluation_is_made_up_once(train, whole, tmp_path, code, flags, prelude, ranks):
    stopped = train(tmp_path, *flags, prelude=prelude, ranks=ranks)
    assert stopped.code == code and "test" not in printed(stopped), stopped.output[-3000:]
    assert complete_iterations(tmp_path) == [f"iter_{STEPS:07d}"] and not (tmp_path / EVALUATED).exists()
    before = written(tmp_path / f"iter_{STEPS:07d}")
    again = train(tmp_path, *flags, ranks=ranks)
    assert again.code == 0 and MADE_UP in again.output and printed(again) == whole, again.output[-3000:]
    assert "no step is left, and nothing is saved" in again.output and "schedule: steps" not in again.output
    assert written(tmp_path / f"iter_{STEPS:07d}") == before  # a second save would begin by breaking the first
    third = train(tmp_path, *flags, ranks=ranks)
    assert third.code == 0 and NOTHING in third.output and MADE_UP not in third.output


def test_other_weights_of_the_same_iteration_are_evaluated(train, tmp_path):
    assert train(tmp_path, "--save-interval", 2).code == 0 and (tmp_path / EVALUATED).exists()
    killed = train(tmp_path, "--save-interval", 2, "--ckpt-step", 2, "--seed", 99,
                   prelude=AT_CALL.format(call=2, act=KILL))
    assert killed.code == -9 and "test" not in printed(killed), killed.output[-3000:]
    assert MADE_UP in train(tmp_path, "--save-interval", 2, "--seed", 99).output


def test_what_cannot_be_evaluated_is_not_made_up(train, tmp_path):
    killed = train(tmp_path, "--no-save-optim", prelude=AT_CALL.format(call=2, act=KILL))
    assert killed.code == -9, killed.output[-3000:]
    for flags in (), ("--no-load-optim", "--eval-weights", "both"):
        again = train(tmp_path, "--no-save-optim", *flags)
        assert again.code == 0 and not printed(again), again.output[-3000:]
        said = " ".join(again.output.split())  # its lines are wrapped
        assert f"{NOTHING} (--skip-train evaluates it); its last evaluation is not made up: that needs the opt" in said
    others = " ".join(train(tmp_path, "--no-save-optim", "--no-load-optim", "--seed", 5).output.split())
    assert "its last evaluation is not made up: the command line changes --seed from 7 to 5" in others
    other = train(tmp_path, "--no-save-optim", "--no-load-optim", "--lr", 1e-2)  # of a rate that no step has any more
    assert other.code == 0 and MADE_UP in other.output and printed(other), other.output[-3000:]


@pytest.mark.parametrize("weights, lines", [("both", 2), ("ema", 1), ("raw", 1)])
def test_a_run_whose_time_is_out_in_an_evaluation_ends_that_and_is_saved(train, tmp_path, weights, lines):
    flags = "--eval-weights", weights, "--eval-interval", STEPS - 2, *LIMIT
    run = train(tmp_path, *flags, prelude=AT_CALL.format(call=1, act=OUT_OF_TIME))
    assert run.code == 0 and not printed(run), run.output[-3000:]
    assert run.output.count("  validation") == lines and run.output.count("exiting program after") == 1
    assert complete_iterations(tmp_path) == [f"iter_{STEPS - 2:07d}"]


def test_an_evaluation_behind_the_end_is_not_cut_off_by_time(train, whole, tmp_path):
    run = train(tmp_path, *LIMIT, *BEHIND_ITS_END, prelude=AT_CALL.format(call=1, act=OUT_OF_TIME))
    assert run.code == 0 and printed(run) == whole, run.output[-3000:]
    assert NOTHING in train(tmp_path, *LIMIT, *BEHIND_ITS_END).output


def test_a_run_that_is_stopped_early_is_tested(train, tmp_path):
    worse = """
from hrm_megatron.training.early_stopping import Record
Record.evaluations_since_best = 1
"""
    flags = "--early-stopping", 1, "--eval-interval", 2
    said = train(tmp_path, *flags, prelude=worse + AT_CALL.format(call=2, act=KILL))
    assert said.code == -9 and "stopped at step 2" in said.output and not printed(said), said.output[-3000:]
    before = written(tmp_path / "iter_0000002")
    again = train(tmp_path, *flags, prelude=worse)
    assert again.code == 0 and "where the run was stopped early; its last evaluation is made up" in again.output
    assert printed(again).keys() == {"test"} and written(tmp_path / "iter_0000002") == before
    assert f"train_iters ..................................... {STEPS}\n" in (tmp_path / "arguments.txt").read_text()
    assert "stopped early at iteration 2, nothing to train" in train(tmp_path, *flags, prelude=worse).output
    more = train(tmp_path, "--early-stopping", 2, "--eval-interval", 2)  # who asks for more gets it
    assert more.code == 0 and complete_iterations(tmp_path)[-1] == f"iter_{STEPS:07d}", more.output[-3000:]
