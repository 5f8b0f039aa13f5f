"""Losses that jump: which those are, and that a run goes back from them."""
import argparse
import json
import random

import pytest

from hrm_megatron.checkpoint.folders import find_iteration
from hrm_megatron.training.bad_steps import RECORD
from hrm_megatron.training.loss_spikes import DEVIATIONS, FEWEST, LEAST, NORMAL, WINDOW, Spikes, take_losses
from tests.training.test_resume import tensors_that_differ

# What the last stage reports of these steps is a hundred times their loss; updates stay what they are.
REPORTED = """
from hrm_megatron.training import loss_spikes
from hrm_megatron.training.step import TrainingStep
loss_spikes.FEWEST = 3
stock = TrainingStep.loss
def loss(self, batch, training, scores):
    *rest, report = stock(self, batch, training, scores)
    if training and self.running_step() in {steps}:
        report["lm loss"] = report["lm loss"] * report["lm loss"].new_tensor([100, 1])
    return (*rest, report)
TrainingStep.loss = loss
"""


def noted(losses):
    spikes = Spikes(argparse.Namespace())
    return spikes, [bool(spikes.note(step, loss)) for step, loss in enumerate(losses, 1)]


def test_losses_that_fall_with_noise_are_no_spikes():
    """A power law with noise of 2 %, normal: of 20,000 of them none lies seven deviations out."""
    rng = random.Random(0)
    losses = [(2 + 8 * step ** -0.3) * (1 + 0.02 * rng.gauss(0, 1)) for step in range(1, 20_001)]
    assert not any(noted(losses)[1])


def test_a_jump_is_one_and_does_not_hide_the_next():
    """Of 20 losses at 2.00 and 44 at 2.04 the median is 2.04 and the median distance 0, so that the least deviation
    decides; three spikes among them change neither."""
    quiet = [2.0] * 20 + [2.04] * 44
    bound = 2.04 * (1 + DEVIATIONS * LEAST)
    spikes, found = noted([*quiet, bound * 1.001, bound * 1.001, bound * 100, bound * 0.999, bound * 1.001])
    assert spikes.in_a_row == [len(quiet) + 5] and found[:64] == [False] * 64
    assert found[64:] == [True, True, True, False, True]
    noisy, _ = noted([2.0, 2.4, 2.1, 2.3] * 16)  # median 2.2, distances 0.1 and 0.2
    assert noisy.bound() == pytest.approx(2.2 + DEVIATIONS * NORMAL * 0.15)


def test_a_level_that_stays_is_no_spike():
    found = noted([2.0] * WINDOW + [3.0] * WINDOW)[1]
    assert found == [False] * WINDOW + [True] * (WINDOW // 2) + [False] * (WINDOW // 2)


def test_too_few_losses_say_nothing_but_a_loss_that_is_no_number_does():
    spikes, found = noted([1.0] * (FEWEST - 1) + [50.0, float("nan"), float("inf")])
    assert found == [False] * FEWEST + [True, True] and spikes.in_a_row == [FEWEST + 1, FEWEST + 2]


@pytest.mark.survives("losses that jump: rollback", "1 to 4 ranks")
@pytest.mark.parametrize("ranks, layout", [
    pytest.param(1, (), id="one"),
    pytest.param(4, ("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2), id="TP2-PP2",
                 marks=[pytest.mark.slow, pytest.mark.ranks])])
def test_a_run_goes_back_and_leaves_the_rows_of_spikes_out(launch, fullbatch_arguments, native_start, tmp_path, ranks,
                                                           layout):
    """One by itself is only named; two in a row behind the checkpoint of step 6 end the run, and a second start is
    bitwise the one that was told to leave them out."""
    folder = tmp_path / "checkpoints"
    arguments = [*fullbatch_arguments, *layout, "--save-interval", 2]
    spiky = ["--load", folder, "--save", folder, "--on-loss-spike", "rollback", "--rollback-after", 2]
    begun = launch(*arguments, "--load", native_start, "--save", folder, "--exit-interval", 2, ranks=ranks)
    assert begun.code == 0, begun.output
    # Before step 5 come the losses of steps 3 and 4: its spike is seen where two are enough.
    injected = REPORTED.format(steps={5, 7, 8}).replace("FEWEST = 3", "FEWEST = 2")
    first = launch(*arguments, *spiky, "--exit-interval", 8, ranks=ranks, prelude=injected)
    assert first.code == 2 and first.errors == [
        f"error: steps 7, 8: the loss is a spike, 2 in a row; the same command goes on from the last checkpoint and "
        f"leaves their rows out ({folder / RECORD})"], first.output
    assert sum("is a spike: above" in line for line in first.output.splitlines()) == 3
    assert json.loads((folder / RECORD).read_text()) == dict(steps=[7, 8], returns={"6": 1})
    assert find_iteration(folder).name == "iter_0000006"
    second = launch(*arguments, *spiky, "--exit-interval", 10, ranks=ranks, prelude=injected)
    assert second.code == 0, second.output
    told = launch(*arguments, "--load", native_start, "--save", tmp_path / "told", "--exit-interval", 10,
                  "--iterations-to-skip", 7, 8, ranks=ranks)
    assert told.code == 0, told.output
    ends = find_iteration(folder), find_iteration(tmp_path / "told")
    assert ends[0].name == ends[1].name == "iter_0000010" and not tensors_that_differ(*ends)


def test_a_spike_is_only_named_where_nothing_else_is_asked(launch, fullbatch_arguments, uninterrupted, tmp_path):
    """In the first step of a start too, which goes on with the losses that its checkpoint holds."""
    folder = tmp_path / "checkpoints"
    options = dict(prelude=REPORTED.format(steps={16, 17}))
    arguments = [*fullbatch_arguments, "--save", folder, "--on-loss-spike", "warn"]
    runs = [launch(*arguments, "--load", uninterrupted / "checkpoints", "--ckpt-step", 12, "--exit-interval", 16,
                   **options), launch(*arguments, "--load", folder, "--exit-interval", 18, **options)]
    for run, step in zip(runs, (16, 17), strict=True):
        assert run.code == 0, run.output
        named, = [line for line in run.output.splitlines() if "is a spike" in line]
        assert f"step {step}: loss" in named and f"of {step - 13} steps before" in named


SAME = dict(data_path=["a"], train_data_path=None, sampled_data_path=None, sampling_rules=None, loss_on_prefix=False,
            on_loss_spike="warn")


@pytest.mark.parametrize("flags, taken", [
    (dict(), True), (dict(on_loss_spike="rollback"), True), (dict(on_loss_spike="ignore"), False),
    (dict(data_path=["b"]), False), (dict(sampled_data_path="b"), False), (dict(loss_on_prefix=True), False)])
def test_losses_before_are_taken_where_data_are_the_same(flags, taken):
    args = argparse.Namespace(**SAME | flags)
    take_losses(args, argparse.Namespace(**SAME, losses_before=[2.0, 3.0]))
    assert args.losses_before == ([2.0, 3.0] if taken else [])


@pytest.mark.parametrize("digests, taken", [(("a", "a"), True), (("a", "b"), False)])
def test_the_same_paths_may_hold_other_data_and_other_paths_the_same(digests, taken):
    stored, args = (argparse.Namespace(**SAME | dict(data_path=[path]), data_digests=dict(train=digest), losses_before=[
        2.0]) for path, digest in zip("xy", digests, strict=True))
    take_losses(args, stored)
    assert args.losses_before == ([2.0] if taken else [])


def test_a_checkpoint_of_before_has_no_losses():
    args = argparse.Namespace(**SAME)
    take_losses(args, argparse.Namespace(data_path=["a"]))  # nor does it know every flag
    assert args.losses_before == []
