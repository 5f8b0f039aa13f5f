"""A fine-tuning begins from the weights that it was told, by HRM-Text's settings, and goes on when typed again."""
from __future__ import annotations

import argparse
import json
import math
import re
import shutil

import pytest
import torch

from hrm_megatron.checkpoint.folders import find_iteration, read_run
from hrm_megatron.checkpoint.fsdp_folder import open_run
from hrm_megatron.config import Architecture, ConfigError
from hrm_megatron.convert.checkpoint import Checkpoint, Training
from hrm_megatron.convert.megatron import read_megatron
from hrm_megatron.convert.run import Conversion, convert
from hrm_megatron.convert.table import table
from hrm_megatron.convert.to_megatron import write_megatron
from hrm_megatron.parallel.log_levels import UNACTIONABLE
from hrm_megatron.training.arguments import fill_cycles
from hrm_megatron.training.checkpoint import starts_new
from hrm_megatron.training.checkpoint_args import MODEL_ARGUMENTS, take_model
from hrm_megatron.training.finetune import fill_settings, settle_folders
from tests.training.conftest import FULLBATCH, scalars
from tests.training.test_resume import tensors_that_differ

# No sizes: they come from the checkpoint. Its rows are of 96 tokens, which do not divide a step of 32,768.
DATA = ["--sampled-data-path", FULLBATCH / "sampled", "--global-batch-size", 8, "--micro-batch-size", 2, "--eval-iters",
        0, "--log-interval", 1]
STILL = ["--lr", 0, "--weight-decay", 0]  # a step that leaves the weights as they are


@pytest.fixture(scope="module")
def trained(uninterrupted):
    """The folder of a run of 24 steps, whose EMA lags behind its weights."""
    return uninterrupted / "checkpoints"


@pytest.fixture(scope="module")
def sources(trained, tmp_path_factory):
    """The same EMA weights by every way into a Megatron folder."""
    place = tmp_path_factory.mktemp("sources")
    found = {"megatron": trained}
    for form in ("native", "hf"):
        convert(Conversion(trained, "megatron", place / form, form))
        found[form] = place / f"{form}_megatron"
        convert(Conversion(place / form, form, found[form], "megatron"))
    return found


@pytest.fixture(scope="module")
def first_steps(launch, sources, tmp_path_factory):
    """The folder of a first step from every source."""
    place = tmp_path_factory.mktemp("first_steps")
    for name, source in sources.items():
        run = launch("--finetune", "--pretrained-checkpoint", source, *DATA, "--save", place / name,
                     "--tensorboard-dir", place / name / "log", "--exit-interval", 1)
        assert run.code == 0, run.output[-3000:]
    return place


def test_a_first_step_is_the_same_from_every_source(first_steps, trained):
    losses = [scalars(first_steps / name / "log") for name in ("megatron", "native", "hf")]
    # fp32 weights pass through every format bitwise, and the step is the same code: there is no rounding to allow for.
    assert losses[0] == losses[1] == losses[2] and list(losses[0]) == [1]
    ends = [find_iteration(first_steps / name) for name in ("megatron", "native", "hf")]
    assert not tensors_that_differ(*ends[:2]) and not tensors_that_differ(ends[0], ends[2])
    assert tensors_that_differ(ends[0], find_iteration(trained))


def test_settings_are_those_of_the_reference(first_steps, launch, trained):
    common = read_run(open_run(find_iteration(first_steps / "megatron")))[0]
    args = common["args"]
    assert (args.lr, args.min_lr, args.lr_warmup_iters, args.ema_decay) == (3e-5, pytest.approx(3e-6), 0, 0.999)
    assert (common["iteration"], args.consumed_train_samples) == (1, 8)
    assert scalars(first_steps / "megatron" / "log", "bp steps") == {1: 5.0}
    told = launch("--finetune", "--pretrained-checkpoint", trained, *DATA, "--dry-run")
    rows = int(re.search(r"training: \d+ examples, (\d+) rows", told.output)[1])
    assert args.train_iters == math.ceil(5 * rows / 8)
    cosine = 0.5 * (1 + math.cos(math.pi / args.train_iters))
    rate = scalars(first_steps / "megatron" / "log", "learning-rate")[1]
    assert rate == pytest.approx(3e-6 + 2.7e-5 * cosine, rel=1e-6)  # an fp32 number, off by 2^-24 at most


@pytest.mark.parametrize("kind", ["ema", "raw", "state"])
def test_it_begins_from_what_it_was_told(launch, trained, tmp_path, kind):
    run = launch("--finetune", "--finetune-from", kind, "--pretrained-checkpoint", trained, *DATA, *STILL, "--save",
                 tmp_path, "--exit-interval", 1)
    assert run.code == 0, run.output[-3000:]
    assert f"fine-tuning: begins from {find_iteration(trained)}: " in run.output
    before, begun = read_megatron(find_iteration(trained)), read_megatron(find_iteration(tmp_path))
    assert begun.iteration == 1
    assert begun.embedding_updates == (before.embedding_updates + 1 if kind == "state" else 1)
    for entry in (entry for entry in table(before.architecture) if entry.trained):
        weight = before.read("raw" if kind == "state" else kind, entry)
        assert torch.equal(begun.read("raw", entry), weight), entry.megatron
        ema = before.read("ema", entry).lerp(weight, 1 - 0.999) if kind == "state" else weight
        assert torch.equal(begun.read("ema", entry), ema), entry.megatron
        assert not torch.equal(before.read("ema", entry), before.read("raw", entry))


@pytest.mark.ranks
@pytest.mark.parametrize("layout", [["--tensor-model-parallel-size", 2], ["--pipeline-model-parallel-size", 2], [],
                                    ["--bf16"]], ids=lambda layout: layout[0] if layout else "data parallel")
def test_every_layout_begins_from_the_ema(launch, trained, tmp_path, layout):
    run = launch("--finetune", "--pretrained-checkpoint", trained, *DATA, *STILL, "--save", tmp_path,
                 "--exit-interval", 1, *layout, ranks=2)
    assert run.code == 0, run.output[-3000:]
    before, begun = read_megatron(find_iteration(trained)), read_megatron(find_iteration(tmp_path))
    stored = torch.bfloat16 if "--bf16" in layout else torch.float32
    assert all(torch.equal(begun.read("raw", entry), before.read("ema", entry).to(stored).float())
               for entry in table(before.architecture) if entry.trained)


def test_the_same_command_again_goes_on_bitwise(launch, trained, tmp_path):
    def run(folder, *more):
        done = launch("--finetune", "--pretrained-checkpoint", trained, *DATA, "--train-iters", 4, "--lr", 1e-3,
                      "--save", tmp_path / folder, "--tensorboard-dir", tmp_path / folder / "log", *more)
        assert done.code == 0, done.output[-3000:]
        return done.output

    outputs = [run("whole"), run("stopped", "--exit-interval", 2)]
    shutil.rmtree(tmp_path / "stopped" / "log")
    outputs.append(run("stopped"))
    assert f"goes on after step 2, loaded from {tmp_path / 'stopped'}" in outputs[-1]
    assert "schedule: steps 3 to 4 of" in outputs[-1] and "bp_steps 5 to 5;" in outputs[-1]
    assert not [line for output in outputs for line in output.splitlines()
                if "Warning:" in line or any(re.search(remark.text, line) for remark in UNACTIONABLE)]
    whole, rest = scalars(tmp_path / "whole" / "log"), scalars(tmp_path / "stopped" / "log")
    assert rest == {step: whole[step] for step in (3, 4)} and set(whole) == {1, 2, 3, 4}
    assert not tensors_that_differ(*(find_iteration(tmp_path / name) for name in ("whole", "stopped")))
    again = run("stopped", "--finetune-from", "raw")
    assert (f"iteration 4 of 4 is done, nothing to train (--skip-train --use-checkpoint-args --load "
            f"{tmp_path / 'stopped'} in place of --finetune evaluates it)") in again
    assert "began from ema; --finetune-from raw has no effect any more" in again


def test_shorter_rows_leave_the_model_its_context(launch, trained, tmp_path):
    def run(step, *more):
        done = launch("--finetune", "--pretrained-checkpoint", trained, *DATA, "--seq-length", 64, "--train-iters", 2,
                      "--save", tmp_path / "short", "--ckpt-step", step, *more)
        assert done.code == 0, done.output[-3000:]
        return done.output

    dropped = "--ckpt-step {} is an iteration to begin from, and has no effect any more"
    assert f"begins from {trained / 'iter_0000012'}" in run(12, "--exit-interval", 1)
    assert dropped.format(24) in run(24)
    assert dropped.format(12) not in run(12) and dropped.format(24) in run(24)  # also behind the second start
    convert(Conversion(tmp_path / "short", "megatron", tmp_path / "again", "megatron"))
    for folder in (tmp_path / "short", tmp_path / "again"):
        training = read_megatron(find_iteration(folder)).training
        assert (training.seq_length, training.row_tokens, training.tokens_per_step) == (96, 64, 8 * 64)
    convert(Conversion(tmp_path / "again", "megatron", tmp_path / "hf", "hf"))
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["max_position_embeddings"] == 96


def test_what_a_new_run_does_not_take_from_a_checkpoint_is_said(launch, trained):
    run = launch("--pretrained-checkpoint", trained, "--use-checkpoint-args", *DATA, "--train-iters", 1, "--lr", 1e-3,
                 "--use-checkpoint-opt-param-scheduler")
    assert run.code == 0, run.output[-3000:]
    start = find_iteration(trained)
    assert f"begins from {start}: its raw weights, a new optimizer; from its EMA, which exports" in run.output
    assert f"--use-checkpoint-opt-param-scheduler takes none from {start}" in run.output


@pytest.mark.parametrize("what", ["finetune", "skip_train"])
@pytest.mark.parametrize("cycles, stored, given, ticks", [
    (1, 2, None, (2, 2)), (2, 8, None, (2, 8)), (2, 8, 3, (2, 3))])
def test_gradient_ticks_are_those_of_the_checkpoint(single_rank, tmp_path, cycles, stored, given, ticks, what):
    architecture = Architecture(1, 24, 3, 40, 250, h_cycles=cycles, l_cycles=1 if cycles == 1 else 3)
    write_megatron(Checkpoint(tmp_path, architecture, Training(bp_max_steps=stored), 0, 0, frozenset({"raw"}),
                              lambda _, entry: torch.zeros(entry.shape, dtype=torch.float32 if entry.trained else
                                                           torch.bfloat16)), tmp_path)
    args = argparse.Namespace(**dict.fromkeys(MODEL_ARGUMENTS), finetune=what == "finetune", load=None, ckpt_step=None,
                              skip_train=what == "skip_train",
                              pretrained_checkpoint=str(tmp_path), load_newest_valid=False, seq_length=None,
                              bp_min_steps=None, bp_max_steps=given, use_checkpoint_opt_param_scheduler=False)
    take_model(args, {})
    fill_cycles(args)
    assert (args.bp_min_steps, args.bp_max_steps) == ticks


def arguments(**changes):
    """What settles where a run begins and goes on, of a fine-tuning that is given as it should be."""
    values = dict(finetune=True, finetune_from=None, pretrained_checkpoint="runs/XL", load=None, save="runs/sft",
                  skip_train=False, print_config=False, no_load_optim=False, lora_rank=None, lora_alpha=None,
                  lora_target_modules=None)
    return argparse.Namespace(**values | changes)


@pytest.mark.parametrize("changes, said", [
    (dict(save="runs/XL"), "--save runs/XL is the folder that it begins from"),
    (dict(load="runs/other"), "leave --load runs/other out"),
    (dict(pretrained_checkpoint=None, load="runs/sft"), "is the folder that it begins from"),
    (dict(finetune=False, finetune_from="ema"), "--finetune-from ema: has no effect without --finetune"),
    (dict(skip_train=True), "--finetune is incompatible with --skip-train: of what it has saved, --skip-train "
                            "--use-checkpoint-args --load runs/sft in place of --finetune evaluates it"),
    (dict(skip_train=True, lora_rank=4), "read adapters as they are, --skip-train wants them merged"),
    (dict(no_load_optim=True), "--finetune is incompatible with --no-load-optim"),
], ids=str)
def test_what_makes_no_sense_is_one_line(changes, said):
    with pytest.raises(ConfigError) as refused:
        settle_folders(arguments(**changes))
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_load_is_as_good_as_pretrained_checkpoint():
    args = arguments(pretrained_checkpoint=None, load="runs/XL")
    settle_folders(args)
    assert (args.pretrained_checkpoint, args.load) == ("runs/XL", "runs/sft")


@pytest.mark.parametrize("finetune", [False, True])
def test_load_and_save_name_one_folder_in_any_words(tmp_path, monkeypatch, finetune):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to("run")
    monkeypatch.chdir(tmp_path)
    for load in ("run", "run/", "./run", "link", str(tmp_path / "run")):
        args = arguments(finetune=finetune, load=load, save="run")
        settle_folders(args)
        assert (args.load, args.save) == ("run", "run")
    args = arguments(finetune=False, load="other/", save="run")
    settle_folders(args)
    assert args.load == "other/"


def test_what_is_given_wins():
    given = dict(lr=1e-4, ema_decay=0.99, bp_warmup_fraction=0.1, min_lr=2e-5, train_iters=7, global_batch_size=3)
    args = argparse.Namespace(**given, epochs=None, train_samples=None, seq_length=100)
    fill_settings(args, given)
    assert vars(args) == {**given, "epochs": None, "train_samples": None, "seq_length": 100}
    args = argparse.Namespace(**dict.fromkeys([*given, "epochs", "train_samples"]) | dict(lr=1e-4, seq_length=4096))
    fill_settings(args, {"lr"})
    assert (args.lr, args.min_lr, args.epochs, args.global_batch_size) == (1e-4, pytest.approx(1e-5), 5, 8)
    args.global_batch_size, args.seq_length = None, 96
    with pytest.raises(ConfigError, match="--seq-length 96 does not divide the 32768 tokens per step"):
        fill_settings(args, {"lr"})


def test_it_begins_from_a_folder_within_its_own(tmp_path):
    args = argparse.Namespace(load=str(tmp_path / "sft"), pretrained_checkpoint=str(tmp_path / "sft" / "base"))
    own, base = tmp_path / "sft" / "iter_0000004", tmp_path / "sft" / "base" / "iter_0000004"
    assert starts_new(args, base) and not starts_new(args, own)
    (tmp_path / "archive" / "iter_0000008").mkdir(parents=True)
    own.parent.mkdir()
    (own.parent / "iter_0000008").symlink_to(tmp_path / "archive" / "iter_0000008")
    assert not starts_new(args, own.parent / "iter_0000008")  # an iteration that lies on another disk
    assert starts_new(args, tmp_path / "sft" / "release")


@pytest.mark.parametrize("form", ["native", "hf"])
def test_a_folder_of_another_format_is_refused_with_the_command_that_converts_it(launch, sources, tmp_path, form):
    source = sources[form].parent / form
    run = launch("--finetune", "--pretrained-checkpoint", source, *DATA, "--save", tmp_path / "sft")
    assert run.code == 2
    [error] = run.errors
    # As the fixture converts it.
    assert (f"`python tools/convert_checkpoint.py --load {source} --load-format {form} --save {sources[form]} "
            f"--save-format megatron`, and give {sources[form]}") in error


def test_a_folder_of_another_kind_of_run_is_refused(launch, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "own")
    refused = launch("--finetune", "--pretrained-checkpoint", trained, *DATA, "--save", tmp_path / "own")
    assert refused.code == 2 and "of a run that was no fine-tuning; choose another --save" in refused.errors[0]
    convert(Conversion(trained, "megatron", tmp_path / "weights", "megatron", weights="raw"))
    for kind, missing in (("ema", "ema"), ("state", "exp_avg")):
        refused = launch("--finetune", "--finetune-from", kind, "--pretrained-checkpoint", tmp_path / "weights", *DATA)
        assert refused.code == 2 and f"holds weights alone, no {missing}; leave it out" in refused.errors[0]
