"""Runs that are started again, go on by another schedule, or take their sizes from a checkpoint."""
import argparse
import json
import re

import pytest

from hrm_megatron.checkpoint.folders import complete_iterations
from hrm_megatron.config import ConfigError
from hrm_megatron.optim.schedule import BPSchedule, LRSchedule, as_fp32
from tests.training.conftest import FULLBATCH, scalars, written

LAYOUT = ["--global-batch-size", 8, "--micro-batch-size", 4]
DATA = ["--sampled-data-path", FULLBATCH / "sampled"]
# Megatron's would import transformers, seconds of every start; a run reads ids.
NO_TOKENIZERS = "import sys; sys.modules['megatron.core.tokenizers.text'] = None"


@pytest.fixture(scope="module")
def reference():
    """Learning rate and gradient ticks of the reference's own steps."""
    steps = json.loads((FULLBATCH / "run.json").read_text())["steps"]
    return {step["step"]: step["lr"] for step in steps}, {step["step"]: step["bp_steps"] for step in steps}


@pytest.fixture
def files_of(uninterrupted):
    """The finished run's checkpoints, which nothing may touch."""
    folder = uninterrupted / "checkpoints"
    before = written(folder)
    yield folder
    assert written(folder) == before


@pytest.mark.parametrize("train_iters, line", [
    (24, "iteration 24 of 24 is done, nothing to train"),
    (12, "iteration 24 is done, nothing to train: --train-iters 12 asks for fewer")])
def test_a_finished_run_started_again_ends_well_in_one_line(launch, fullbatch_arguments, files_of, tmp_path,
                                                            train_iters, line):
    run = launch(*fullbatch_arguments, "--load", f"{files_of}/", "--save", files_of, "--train-iters", train_iters,
                 "--tensorboard-dir", tmp_path / "log", "--run-report", tmp_path / "report.html", ranks=2)
    assert run.code == 0, run.output
    assert run.output.count(f"--run-report {tmp_path / 'report.html'}: not written") == 1  # there is no log
    assert run.output.count("is done, nothing to train") == 1 and f"{files_of}/iter_0000024: {line}" in run.output
    assert "is done" not in run.last_output
    assert "initialize" not in run.output and not (tmp_path / "log").exists()  # neither a process group nor a model


ALL_IS_LOADED = """
from hrm_megatron.model import hrm
from hrm_megatron.training.step import TrainingStep, innermost
def initialize(*_):
    raise AssertionError("weights are drawn that a checkpoint replaces")
hrm.initialize, forward = initialize, TrainingStep.forward
def checked(self, data, model):
    part = innermost(model)
    missing = [name for name, tensor in [*part.named_parameters(), *part.named_buffers()] if tensor.isnan().any()]
    assert not missing, missing
    return forward(self, data, model)
TrainingStep.forward = checked
"""


@pytest.mark.parametrize("begins, ranks", [
    (["--load", "{0}", "--ckpt-step", 12, "--exit-interval", 13], 1),
    (["--load", "{0}", "--ckpt-step", 12, "--exit-interval", 13, "--no-load-optim",
      "--pipeline-model-parallel-size", 2], 2),
    (["--finetune", "--pretrained-checkpoint", "{0}", "--train-iters", 1], 1),  # from the EMA
    (["--finetune", "--pretrained-checkpoint", "{0}", "--train-iters", 1, "--lora-rank", 4,
      "--tensor-model-parallel-size", 2], 2)])
def test_what_a_checkpoint_fills_is_not_drawn_before(launch, fullbatch_arguments, files_of, begins, ranks):
    begins = [word.format(files_of) if isinstance(word, str) else word for word in begins]
    schedule = ["--bp-warmup-fraction", 0.0, "--lr-warmup-iters", 0] if "--finetune" in begins else []
    run = launch(*fullbatch_arguments, *schedule, *begins, ranks=ranks, prelude=ALL_IS_LOADED)
    assert run.code == 0, (run.output[-3000:], run.last_output[-3000:])


def test_logged_rates_are_those_of_the_steps(uninterrupted, reference):
    assert scalars(uninterrupted / "log", "learning-rate") == reference[0]


@pytest.mark.parametrize("flags", [[], ["--no-load-optim"]])
def test_another_schedule_is_refused_before_anything_is_built(launch, fullbatch_arguments, files_of, flags):
    run = launch(*fullbatch_arguments, "--load", files_of, "--ckpt-step", 12, "--train-iters", 48, "--lr", 1e-3,
                 "--global-batch-size", 4, "--micro-batch-size", 2, *flags, ranks=2)
    assert run.code == 2 and "Traceback" not in run.output and "initialize" not in run.output
    (error,) = run.errors
    for part in ("--train-iters 24 (the command line makes 48)", "--lr 0.004 (the command line makes 0.001)",
                 "--global-batch-size 8 (the command line makes 4)", "--override-opt-param-scheduler",
                 "--use-checkpoint-opt-param-scheduler"):
        assert part in error


def test_a_run_that_goes_on_with_other_rows_per_step_follows_iterations(launch, fullbatch_arguments, files_of,
                                                                        reference, tmp_path):
    """With half of the rows there are rows enough to the end, and each step has the reference's rate and ticks."""
    run = launch(*fullbatch_arguments, "--load", files_of, "--ckpt-step", 12, "--global-batch-size", 4,
                 "--override-opt-param-scheduler", "--tensorboard-dir", tmp_path, prelude=NO_TOKENIZERS)
    assert run.code == 0, run.output[-3000:]
    rates, ticks = ({step: value for step, value in of.items() if step > 12} for of in reference)
    assert scalars(tmp_path, "learning-rate") == rates and scalars(tmp_path, "bp steps") == ticks
    console = dict(re.findall(r"step +(\d+)/24 .* lr (\S+) ", run.last_output))
    assert console == {str(step): f"{rate:.2e}" for step, rate in rates.items()}
    assert "schedule: the command line's" in run.output and f", {rates[13]:g} at step 13; bp_steps" in run.output


def test_a_longer_run_by_the_checkpoints_schedule_holds_the_lowest_rate(launch, fullbatch_arguments, files_of,
                                                                       tmp_path):
    flags = [*fullbatch_arguments, "--lr", 1e-2, "--min-lr", 1e-3, "--bp-max-steps", 3,
             "--use-checkpoint-opt-param-scheduler"]
    run = launch(*flags, "--load", files_of, "--train-iters", 32, "--save", tmp_path / "checkpoints",
                 "--tensorboard-dir", tmp_path / "log")
    assert run.code == 0, run.output[-3000:]
    # And a third run, by the schedule of the first, from a checkpoint of the second.
    run = launch(*flags, "--load", tmp_path / "checkpoints", "--train-iters", 35, "--tensorboard-dir", tmp_path / "log")
    assert run.code == 0, run.output[-3000:]
    steps = set(range(25, 36))
    assert scalars(tmp_path / "log", "learning-rate") == dict.fromkeys(steps, as_fp32(4e-4))
    assert scalars(tmp_path / "log", "bp steps") == dict.fromkeys(steps, 5)


@pytest.mark.parametrize("flag, schedule", [("--override-opt-param-scheduler", LRSchedule(2e-3, 2e-4, 4, 24)),
                                            ("--use-checkpoint-opt-param-scheduler", LRSchedule(4e-3, 4e-4, 4, 24))])
def test_a_new_optimizer_goes_on_by_the_same_clock(launch, fullbatch_arguments, files_of, tmp_path, flag, schedule):
    """And is told of what is others than in the run before, as every start is."""
    run = launch(*fullbatch_arguments, "--load", files_of, "--ckpt-step", 12, "--no-load-optim", "--lr", 2e-3,
                 "--min-lr", 2e-4, "--seed", 7, flag, "--exit-interval", 14, "--tensorboard-dir", tmp_path)
    assert run.code == 0, run.output[-3000:]
    ticks = BPSchedule(2, 5, 0.6, 24)
    assert scalars(tmp_path, "learning-rate") == {step: schedule.at(step) for step in (13, 14)}
    assert scalars(tmp_path, "bp steps") == {step: ticks.at(step) for step in (13, 14)}
    assert "the command line changes --seed from 1234 to 7" in run.output and f"({flag})" in run.output


@pytest.mark.parametrize("optimizer", [[], ["--no-load-optim"]])
def test_the_checkpoints_schedule_brings_its_rate(launch, files_of, reference, tmp_path, optimizer):
    flags = [*DATA, *LAYOUT, "--train-iters", 24, "--ema-decay", 0.9, "--eval-iters", 0, "--use-checkpoint-args",
             "--use-checkpoint-opt-param-scheduler", "--load", files_of, "--ckpt-step", 12, *optimizer]
    run = launch(*flags, "--exit-interval", 14, "--tensorboard-dir", tmp_path)
    assert run.code == 0, run.output[-3000:]
    assert scalars(tmp_path, "learning-rate") == {step: reference[0][step] for step in (13, 14)}


def test_a_converted_checkpoint_has_no_schedule_to_keep(launch, fullbatch_arguments, native_start):
    """Not even a rate: the converter's own would be taken."""
    for flags in (fullbatch_arguments, [*DATA, *LAYOUT, "--train-iters", 24, "--eval-iters", 0,
                                        "--use-checkpoint-args"]):
        run = launch(*flags, "--use-checkpoint-opt-param-scheduler", "--load", native_start)
        (error,) = run.errors
        assert run.code == 2 and error.startswith(f"error: --use-checkpoint-opt-param-scheduler: {native_start}/iter_")
        assert error.endswith("was converted and holds no schedule; give --lr and the rest of one, and leave the flag "
                              "out")


def test_a_checkpoint_gives_its_model_and_the_row_length(launch, files_of, uninterrupted, tmp_path):
    schedule = ["--train-iters", 24, "--lr", 4e-3, "--min-lr", 4e-4, "--lr-warmup-iters", 4, "--bp-warmup-fraction",
                0.6, "--ema-decay", 0.9, "--eval-iters", 0, "--log-interval", 1]
    run = launch(*DATA, *LAYOUT, *schedule, "--use-checkpoint-args", "--load", files_of, "--ckpt-step", 12,
                 "--exit-interval", 14, "--tensorboard-dir", tmp_path)
    assert run.code == 0, run.output[-3000:]
    whole = scalars(uninterrupted / "log")
    assert scalars(tmp_path) == {step: whole[step] for step in (13, 14)}
    assert "model num_layers 2, hidden_size 32, num_attention_heads 4" in run.output


def test_without_validation_data_the_default_flags_train_whole(launch, tmp_path):
    sizes = ["--num-layers", 1, "--hidden-size", 32, "--num-attention-heads", 4, "--seq-length", 96, "--lr", 1e-3]
    run = launch(*DATA, *sizes, *LAYOUT, "--train-iters", 4, "--eval-interval", 2, "--save", tmp_path,
                 "--save-interval", 2)
    assert run.code == 0, run.output[-3000:]
    assert run.output.count("validation: off, there is nothing to validate on; give --valid-data-path") == 1
    assert complete_iterations(tmp_path) == ["iter_0000002", "iter_0000004"] and "loss at" not in run.last_output


def test_an_iteration_is_named_by_the_folder_around_it_and_its_step(tmp_path, monkeypatch):
    from hrm_megatron.training import checkpoint

    monkeypatch.setattr(checkpoint, "is_complete", lambda folder: True)
    (tmp_path / "best").symlink_to(tmp_path / "iter_0000040")
    for load in ("iter_0000040", "best"):
        args = argparse.Namespace(load=str(tmp_path / load), pretrained_checkpoint=None, ckpt_step=None, save=None,
                                  finetune=False, skip_train=False)
        with pytest.raises(ConfigError, match=f"{load}: is one iteration; give --load {tmp_path} --ckpt-step 40"):
            checkpoint.starting_point(args)


def test_a_checkpoint_that_is_not_there_gives_no_model(launch, tmp_path):
    for flags, part in (([], "--use-checkpoint-args: has no effect without --load or --pretrained-checkpoint"),
                        (["--load", tmp_path], f"--load {tmp_path}: no checkpoint there")):
        run = launch(*DATA, *LAYOUT, "--train-iters", 4, "--lr", 1e-3, "--use-checkpoint-args", *flags)
        assert run.code == 2 and len(run.errors) == 1 and part in run.errors[0], run.output
    run = launch(*DATA, *LAYOUT, "--train-iters", 4, "--lr", 1e-3, "--use-checkpoint-args", "--load", tmp_path,
                 "--save", tmp_path)
    assert run.code == 2 and "none at" in run.output and "--num-layers is not set" in run.errors[0]
