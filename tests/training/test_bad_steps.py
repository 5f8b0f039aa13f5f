"""Steps whose gradients are not finite: what --on-nonfinite makes of them is what a run without these steps does."""
import json
import re

import pytest

from hrm_megatron.checkpoint.dcp import DCPFolder
from hrm_megatron.checkpoint.folders import complete_iterations, find_iteration, read_run
from hrm_megatron.config import ConfigError
from hrm_megatron.optim.schedule import LRSchedule
from hrm_megatron.training.bad_steps import MOST_RETURNS, RECORD, Record
from tests.training.conftest import scalars
from tests.training.test_resume import tensors_that_differ

ROWS = 8  # in a step
# On one rank alone, in these steps: the others must leave them out too.
POISON = """
import os
from hrm_megatron.training.step import TrainingStep
stock = TrainingStep.loss
def loss(self, batch, training, scores):
    total, *rest = stock(self, batch, training, scores)
    bad = training and self.running_step() in {steps} and os.environ["RANK"] == "{rank}"
    return (total * float("nan") if bad else total, *rest)
TrainingStep.loss = loss
"""


def poison(*steps, rank=0):
    return POISON.format(steps=set(steps), rank=rank)


def end_of(folder):
    return find_iteration(folder)


def finite(folder):
    stored = DCPFolder(folder)
    return all(stored.tensor(key).isfinite().all() for key in stored.shapes())


@pytest.fixture(scope="module")
def arguments(fullbatch_arguments, native_start):
    return [*fullbatch_arguments, "--exit-interval", 8]


@pytest.fixture
def train(launch, arguments, native_start):
    def run(folder, *flags, load=None, **options):
        return launch(*arguments, "--load", load or native_start, "--save", folder / "checkpoints", "--tensorboard-dir",
                      folder / "log", *flags, **options)
    return run


LAYOUTS = [pytest.param(2, (), id="DP2"),
           *(pytest.param(4, flags, id=name, marks=[pytest.mark.slow, pytest.mark.ranks]) for name, flags in {
               "TP2-PP2": ("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2),
               "DP2-CP2": ("--context-parallel-size", 2),
               "DP4-overlap": ("--overlap-grad-reduce", "--overlap-param-gather", "--micro-batch-size", 1)}.items())]


@pytest.mark.survives("steps without a number: not taken", "1 to 4 ranks")
@pytest.mark.parametrize("ranks, layout", LAYOUTS)
def test_a_step_that_is_not_taken_is_one_that_never_was(train, tmp_path, ranks, layout):
    """Bitwise, at the first step, within, and before a save: against Megatron's own way to leave steps out."""
    bad = (1, 4, 7)
    injected = poison(*bad, rank=ranks - 1)  # in a pipeline the last rank is the one that has a loss
    skipped = train(tmp_path / "a", "--on-nonfinite", "skip", *layout, ranks=ranks, prelude=injected)
    assert skipped.code == 0, skipped.output[-3000:]
    left_out = train(tmp_path / "b", "--iterations-to-skip", *bad, *layout, ranks=ranks)
    assert left_out.code == 0, left_out.output[-3000:]
    ends = [end_of(tmp_path / name / "checkpoints") for name in "ab"]
    assert ends[0].name == ends[1].name == "iter_0000008" and not tensors_that_differ(*ends)
    assert [read_run(DCPFolder(end))[0]["args"].skipped_train_samples for end in ends] == [len(bad) * ROWS] * 2
    losses = [scalars(tmp_path / name / "log") for name in "ab"]
    assert set(losses[0]) == set(range(1, 9)) and losses[1] == {step: losses[0][step] for step in (2, 3, 5, 6, 8)}
    said = [line for line in skipped.output.splitlines() if "not taken" in line]
    assert len(said) == len(bad) and all("are not finite (1 in a row, " in line for line in said)
    assert "not taken" not in skipped.last_output
    schedule = LRSchedule(4e-3, 4e-4, 4, 24)
    for name in "ab":  # of every step its own
        assert scalars(tmp_path / name / "log", "learning-rate") == {step: schedule.at(step) for step in range(1, 9)}


def test_a_run_without_bad_steps_is_the_same_under_every_policy(train, tmp_path, uninterrupted):
    run = train(tmp_path, "--on-nonfinite", "skip", "--exit-interval", 12)
    assert run.code == 0, run.output
    assert not tensors_that_differ(end_of(tmp_path / "checkpoints"), uninterrupted / "checkpoints" / "iter_0000012")


def test_what_is_due_at_a_step_that_is_left_out_comes_all_the_same(train, tmp_path, native_start):
    """Its save, also where it is the last, and the end of the run."""
    folder = tmp_path / "checkpoints"
    run = train(tmp_path, "--iterations-to-skip", 4, 7, 8, "--save-interval", 4)
    assert run.code == 0, run.output
    assert {path.name for path in folder.glob("iter_*")} == {"iter_0000004", "iter_0000008"}
    assert [line for line in run.output.splitlines() if "its rows are passed over" in line] == [
        f"step {step}: left out, its rows are passed over" for step in (4, 7, 8)]
    assert not [line for line in run.output.splitlines() if "loss" in line and "nan" in line]
    assert tensors_that_differ(end_of(folder), folder / "iter_0000004")
    again = train(tmp_path / "b", "--iterations-to-skip", 7, 8, "--ckpt-step", 4, load=folder)
    assert again.code == 0 and not tensors_that_differ(end_of(folder), end_of(tmp_path / "b" / "checkpoints"))


def test_a_save_may_come_before_the_first_step_that_is_taken(launch, fullbatch_arguments, tmp_path):
    """The checkpoints say which steps were left out."""
    def train(name, *flags, **options):
        run = launch(*fullbatch_arguments, "--save", tmp_path / name, "--load", tmp_path / name, "--exit-interval", 3,
                     *flags, **options)
        assert run.code == 0, run.output[-3000:]
        return end_of(tmp_path / name)
    early, whole = (train(name, "--iterations-to-skip", 1, 2, "--save-interval", every)
                    for name, every in (("early", 1), ("whole", 3)))
    bad = train("bad", "--on-nonfinite", "skip", "--save-interval", 2, prelude=poison(1, 2))
    assert not tensors_that_differ(early, whole) and not tensors_that_differ(bad, whole)
    assert (tmp_path / "early" / "iter_0000001").is_dir() and (tmp_path / "bad" / "iter_0000002").is_dir()
    assert [read_run(DCPFolder(folder))[0]["args"].steps_left_out for folder in (early, bad)] == [[1, 2], []]


@pytest.mark.survives("steps without a number: rollback", "1 process")
def test_a_run_goes_back_and_leaves_the_rows_out(train, tmp_path, native_start):
    """Two bad steps in a row behind the checkpoint of step 4; one by itself before it is only not taken."""
    folder = tmp_path / "checkpoints"
    flags = ["--save-interval", 2, "--on-nonfinite", "rollback", "--rollback-after", 2]
    assert train(tmp_path, "--save-interval", 2, "--exit-interval", 2).code == 0
    first = train(tmp_path, *flags, load=folder, prelude=poison(3, 5, 6))
    assert first.code == 2 and first.errors == [
        f"error: steps 5, 6: gradients are not finite, 2 in a row; the same command goes on from the last checkpoint "
        f"and leaves their rows out ({folder / RECORD})"]
    assert json.loads((folder / RECORD).read_text()) == dict(steps=[5, 6], returns={"4": 1})
    assert end_of(folder).name == "iter_0000004"
    second = train(tmp_path, *flags, load=folder, prelude=poison(3, 5, 6))
    assert second.code == 0, second.output
    assert "bad steps: rows of steps 5, 6 are left out, which this run has gone back from" in second.output
    undisturbed = train(tmp_path / "b", "--iterations-to-skip", 3, 5, 6)
    assert undisturbed.code == 0 and not tensors_that_differ(end_of(folder), end_of(tmp_path / "b" / "checkpoints"))
    assert len(DCPFolder(end_of(folder)).shapes()) > 18


def test_a_run_does_not_go_back_for_ever(train, tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    Record([90], {"0": MOST_RETURNS}).write(folder)
    run = train(tmp_path, "--on-nonfinite", "rollback", "--rollback-after", 1, load=folder, prelude=poison(3))
    assert run.code == 2 and "this run has gone back to step 0 3 times: its rows are not the reason" in run.errors[0]
    assert Record.read(folder / RECORD) == Record([90], {"0": MOST_RETURNS})


def test_returns_are_counted_by_the_checkpoint_gone_back_to(train, tmp_path):
    """Not by the step at which the process that goes back has started."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    Record([90], {"0": MOST_RETURNS}).write(folder)
    run = train(tmp_path, "--save-interval", 4, "--on-nonfinite", "rollback", "--rollback-after", 2, load=folder,
                prelude=poison(5, 6))
    assert run.code == 2 and "the same command goes on from the last checkpoint" in run.errors[0], run.output[-3000:]
    assert Record.read(folder / RECORD) == Record([5, 6, 90], {"0": MOST_RETURNS, "4": 1})


def test_no_start_takes_a_step_without_a_number(train, tmp_path):
    """Megatron's check passes over the first step of a start, unless a checkpoint has told it of that step."""
    first = train(tmp_path, prelude=poison(1))
    assert first.code and not complete_iterations(tmp_path / "checkpoints") and re.search(
        "^error: step 1, the first of this start: not taken: gradients on rank 0 are not finite; if it comes back",
        first.last_output, re.MULTILINE), first.output[-3000:]
    saves, folder = ("--save-interval", 1), tmp_path / "checkpoints"
    for load in (None, folder):  # the second finds in the checkpoint what the first has found, although it was saved
        run = train(tmp_path, *saves, load=load, prelude=poison(3))
        assert run.code == 16 and complete_iterations(folder) == ["iter_0000001", "iter_0000002"], run.output[-3000:]
        assert all(finite(folder / name) for name in complete_iterations(folder))


def test_a_checkpoint_behind_steps_that_were_left_out_is_no_new_one(train, tmp_path):
    folder = tmp_path / "checkpoints"
    flags = "--save-interval", 1, "--on-nonfinite", "rollback", "--rollback-after", 1
    folder.mkdir()
    Record([3, 4, 5], {"2": MOST_RETURNS}).write(folder)
    first = train(tmp_path, *flags, "--exit-interval", 4, load=folder)
    assert first.code == 0, first.output[-3000:]
    run = train(tmp_path, *flags, load=folder, prelude=poison(6))
    assert end_of(folder).name == "iter_0000005"
    assert run.code == 2 and "this run has gone back to step 2 3 times: its rows are not the" in run.errors[0]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"steps": ["a"], "returns": {}}', '{"steps": [], "returns": []}'])
def test_a_damaged_record_is_named(tmp_path, text):
    (tmp_path / RECORD).write_text(text)
    with pytest.raises(ConfigError, match=f"{RECORD}: is no record of bad steps .*; remove it to train on all rows"):
        Record.read(tmp_path / RECORD)


def test_a_record_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / RECORD).mkdir()
    with pytest.raises(ConfigError, match=f"{RECORD}: is no record of bad steps .*; remove it to train on all rows"):
        Record.read(tmp_path / RECORD)


@pytest.mark.parametrize("flags, says", [
    (["--rollback-after", 2], "--rollback-after 2: has no effect without --on-nonfinite rollback or "),
    (["--on-loss-spike", "warn", "--skip-train"], "--on-loss-spike warn: has no effect with --skip-train"),
    (["--on-loss-spike", "rollback", "--save", "a"], "last checkpoint of --save a, but --load is None"),
    (["--on-nonfinite", "skip", "--no-check-for-nan-in-loss-and-grad"], "skip: looks at nothing with --no-check-for"),
    (["--on-nonfinite", "skip", "--fp16"], "skip: --fp16 without --loss-scale takes no such step by itself"),
    (["--on-nonfinite", "skip", "--use-torch-fsdp2"], "and not under FSDP; leave it or the FSDP flag out"),
    (["--on-nonfinite", "skip", "--skip-train"], "skip: has no effect with --skip-train"),
    (["--on-nonfinite", "rollback", "--save", "a", "--load", "b"], "goes back to the last checkpoint of --save a, but"),
])
def test_what_could_not_be_done_is_refused(launch, fullbatch_arguments, flags, says):
    run = launch(*fullbatch_arguments, *flags)
    assert run.code == 2 and len(run.errors) == 1 and says in run.errors[0], run.output
