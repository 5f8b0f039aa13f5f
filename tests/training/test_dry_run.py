"""A dry run builds what a run would, refuses what it would, and writes nothing."""
import argparse
import contextlib
import copy
import io
import random
import re
import shutil
import sys

import pytest

from hrm_megatron.parallel.cpu import activate

activate()

import torch  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.training import arguments as megatron_arguments  # noqa: E402

from hrm_megatron.checkpoint.folders import complete_iterations, find_iteration  # noqa: E402
from hrm_megatron.config import PRESETS, Architecture, ConfigError  # noqa: E402
from hrm_megatron.model import hrm  # noqa: E402
from hrm_megatron.model_types import HRM, MODEL_TYPES  # noqa: E402
from hrm_megatron.parallel.patching import temporarily  # noqa: E402
from hrm_megatron.planner.layout import Layout, check, stage_parameters  # noqa: E402
from hrm_megatron.training import checkpoint_space  # noqa: E402
from hrm_megatron.training.arguments import complete, parse_arguments  # noqa: E402
from hrm_megatron.training.checkpoint_space import check_space, describe_space  # noqa: E402
from hrm_megatron.training.dry_run import build, checked_start, describe_dry_run, first_rank_of, saving_of  # noqa: E402
from hrm_megatron.training.evaluation import Evaluation  # noqa: E402
from hrm_megatron.training.layout import layers_of_stages  # noqa: E402
from hrm_megatron.training.own_flags import checked  # noqa: E402
from hrm_megatron.transformer_config import hrm_config  # noqa: E402
from tests.conftest import GOLDEN  # noqa: E402
from tests.training.conftest import written  # noqa: E402
from tests.training.test_validation import store  # noqa: E402, F401  # a fixture

SIZES = dict(num_layers=6, hidden_size=48, num_attention_heads=6, ffn_hidden_size=72)
WORDS = ["--dry-run", "--lr", "1e-3", "--train-iters", "4", "--seq-length", "96", "--bf16",
         *(str(word) for name, value in SIZES.items() for word in (f"--{name.replace('_', '-')}", value))]
ARCHITECTURE = Architecture(**SIZES, vocab_size=512)
LAYOUTS = 500
NO_EVALUATION = Evaluation(validates=False, tests=False, whole=False, test_iters=0)


@pytest.fixture(scope="module", autouse=True)
def no_other_group():
    """Put away the group of the fixture `single_rank`, which lasts for all tests of a process, while fake ones come."""
    held = torch.distributed.is_initialized()
    if held:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
    yield
    if held:
        torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=torch.distributed.HashStore())
        parallel_state.initialize_model_parallel()


@pytest.fixture(autouse=True)
def as_a_run_starts(monkeypatch):
    """What hrm_megatron.pretrain sets before it imports Megatron."""
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def parsed(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["pretrain", *map(str, words)])
    with contextlib.redirect_stdout(io.StringIO()):
        return parse_arguments(lambda args: 512)


def test_random_layouts_are_refused_here_as_by_the_planner(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pretrain", *WORDS])
    stock, rng, taken = megatron_arguments.parse_args(checked), random.Random(16), []
    for number in range(LAYOUTS):
        tp, pp, cp = rng.choice((1, 2, 3, 4, 6, 8)), rng.choice((1, 1, 2, 3, 5, 8)), rng.choice((1, 1, 2, 3, 4))
        layout = Layout(rng.choice((1, 1, 1, 2, 3)) * tp * pp * cp + (rng.random() < 0.1), tp, pp, cp, tp > 1,
                        rng.choice((96, 100, 144)), rng.choice((1, 2, 3)), rng.choice((6, 12, 13, 24)))
        args = copy.deepcopy(stock)
        vars(args).update(dry_run_ranks=layout.ranks, tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp,
                          context_parallel_size=cp, sequence_parallel=tp > 1, seq_length=layout.row_tokens,
                          micro_batch_size=layout.micro_batch_size, global_batch_size=layout.global_batch_size)
        planned = told = None
        try:
            layers = check(ARCHITECTURE, layout, MODEL_TYPES[HRM].bp_steps[1])
        except ConfigError as error:
            planned = str(error)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                args = complete(args, lambda _: 512)
        except ConfigError as error:
            told = str(error)
        assert (planned is None) == (told is None), (number, layout, planned, told)
        if planned is None:
            assert layers_of_stages(args) == layers
            taken.append(args)
    assert LAYOUTS / 10 < len(taken) < LAYOUTS * 9 / 10
    for args in taken[::10]:  # what both take can be built
        stage = rng.randrange(args.pipeline_model_parallel_size)
        built = build(args, first_rank_of(args, stage))
        counted = stage_parameters(ARCHITECTURE, layers_of_stages(args))[stage]
        assert built.place["PP"] == stage and built.parameters * args.tensor_model_parallel_size == counted


def test_all_is_told_and_nothing_is_written(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    args = parsed(monkeypatch, *WORDS, "--dry-run-ranks", 1024, "--tensor-model-parallel-size", 2,
                  "--sequence-parallel", "--pipeline-model-parallel-size", 4, "--global-batch-size", 1024,
                  "--save", tmp_path / "run", "--save-interval", 3, "--dry-run-rank", 1023)
    lines = [*describe_dry_run(args, None, NO_EVALUATION)]
    text = "\n".join(lines)
    assert "layout: 1024 ranks = TP 2 x PP 4 x CP 1 x DP 128, sequence parallel" in text
    assert [line.split(":")[1].strip() for line in lines if line.startswith("built")] == [
        "stage 0", "stage 1 to 2 (all alike)", "stage 3"]
    assert "\nschedule: steps 1 to 4 of 98,304 tokens; lr 0.001 after 0 steps of warm-up, constant; bp_steps " in text
    assert "data: none given, 512 tokens in the vocabulary assumed; 4 steps of 1024 rows read 4,096 rows" in lines
    space = ARCHITECTURE.num_parameters * (2 + 16) / 1e9
    assert f"checkpoint: {space:.2f} GB each, 2 saves take {2 * space:,.2f} GB; {tmp_path} has " in text
    where = next(i for i, line in enumerate(lines) if line.startswith("rank 1023: TP 1, PP 3, CP 0, DP 127; "))
    table = {line.split()[0]: line.split("[")[1].split("]")[0] for line in lines[where + 1:]}
    assert table["output_layer.weight"] == "256, 48" and "embedding.word_embeddings.weight" not in table
    assert not [*tmp_path.iterdir()] and not torch.distributed.is_initialized()


@pytest.mark.parametrize("flags, kept", [
    (dict(), True), (dict(fp8=None), False), (dict(use_torch_fsdp2=True), False), (dict(fp8_param_gather=True), False)])
def test_weights_are_kept_in_fp8_too_where_layers_do_so(flags, kept):
    args = argparse.Namespace(**dict(bp_max_steps=5, recompute_ticks=0, recompute_gated_act=False, lora_rank=None,
                                     params_dtype=torch.bfloat16, use_torch_fsdp2=False, use_megatron_fsdp=False,
                                     fp8="hybrid", fp8_param_gather=False,
                                     accumulate_allreduce_grads_in_fp32=not flags) | flags)
    assert saving_of(args).fp8_copies == kept and saving_of(args).gradient_itemsize == (2 if flags else 4)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_weights_that_are_counted(name):
    """Of the whole model, by building it without values on one fake rank."""
    from hrm_megatron.training.dry_run import fake_rank

    architecture = PRESETS[name].architecture()
    alone = argparse.Namespace(world_size=1, tensor_model_parallel_size=1, pipeline_model_parallel_size=1,
                               virtual_pipeline_model_parallel_size=None, context_parallel_size=1,
                               use_tp_pp_dp_mapping=False)
    nothing = dict(initialize=lambda *_: None, draw=lambda *_: torch.zeros((), device="cpu"))
    with fake_rank(alone, 0), temporarily(hrm, **nothing), torch.device("meta"):
        model = hrm.HRMModel(hrm_config(architecture, use_cpu_initialization=True), seed=1)
    assert sum(weight.numel() for weight in model.parameters()) == architecture.num_parameters


def test_the_largest_preset_on_512_ranks(monkeypatch):
    args = parsed(monkeypatch, "--dry-run", "--dry-run-ranks", 512, "--hrm-preset", "32B", "--seq-length", 4096,
                  "--bf16", "--tensor-model-parallel-size", 8, "--sequence-parallel",
                  "--pipeline-model-parallel-size", 8, "--train-iters", 10)
    lines = [line for line in describe_dry_run(args, None, NO_EVALUATION) if line.startswith("memory")]
    assert len(lines) == 8 and all("GB predicted on each GPU: weights " in line for line in lines)


@pytest.mark.parametrize("words, says", [
    (("--dry-run-rank", 3), "--dry-run-rank 3: has no effect without --dry-run"),
    (("--dry-run", "--dry-run-ranks", 1025), "--dry-run-ranks 1025: choose 1 to 1024"),
    (("--dry-run", "--dry-run-ranks", 4, "--dry-run-rank", 4), "--dry-run-rank 4: choose 0 to 3"),
    (("--print-config",), "--print-config: has no effect without --hrm-preset; give one of B, L, XL"),
])
def test_flags_without_effect_are_refused(monkeypatch, words, says):
    with pytest.raises(ConfigError, match=says):
        parsed(monkeypatch, *words)


@pytest.mark.parametrize("flags, says", [
    (("--load", "{0}/none"), "--load {0}/none: no checkpoint there"),
    (("--finetune", "--pretrained-checkpoint", "{0}/none"), "--pretrained-checkpoint {0}/none: no checkpoint there")])
def test_a_checkpoint_that_is_not_there_is_refused(monkeypatch, tmp_path, flags, says):
    args = parsed(monkeypatch, *WORDS, "--global-batch-size", 2, *(flag.format(tmp_path) for flag in flags))
    with pytest.raises(ConfigError, match=f"^{says.format(tmp_path)}"):
        next(describe_dry_run(args, None, NO_EVALUATION))


@pytest.mark.parametrize("dry", [True, False])
def test_a_folder_of_another_machine_is_only_reported_by_a_dry_run(monkeypatch, tmp_path, caplog, dry):
    save = tmp_path / "scratch" / "run"
    args = parsed(monkeypatch, *WORDS, "--global-batch-size", 2, "--save", save)
    args.dry_run = dry
    monkeypatch.setattr(checkpoint_space.os, "access", lambda *_: False)
    if dry:
        with caplog.at_level("INFO"):
            assert checked_start(args, None, NO_EVALUATION) == (None, 0)
        assert f"--save {save}: {tmp_path} is not writable here; the run needs a folder that is" in caplog.text
        save.parent.touch()  # no folder on any machine
    with pytest.raises(ConfigError, match=f"^--save {save}: cannot write to {save.parent if dry else tmp_path};"):
        checked_start(args, None, NO_EVALUATION)


def test_a_checkpoint_of_another_model_is_refused_and_none_is_written_to(monkeypatch, native_start, tmp_path):
    folder = shutil.copytree(native_start, tmp_path / "start")
    (folder / "latest_checkpointed_iteration.txt").write_text("")  # which a run would put right
    before = written(folder)
    words = ["--load", folder, "--dry-run", "--lr", "1e-3", "--train-iters", 400, "--seq-length", 96,
             "--num-attention-heads", 4, "--num-layers", 2]
    args = parsed(monkeypatch, *words, "--hidden-size", 32)
    assert checked_start(args, None, NO_EVALUATION) == (folder / find_iteration(native_start).name, 0)
    with pytest.raises(ConfigError, match="its model has hidden_size=32, the command line makes 64"):
        checked_start(parsed(monkeypatch, *words, "--hidden-size", 64), None, NO_EVALUATION)
    assert written(folder) == before


@pytest.mark.parametrize("steps, checkpoint, left, saves", [(24, "iteration 24 of 24 is done, nothing to train", 0, 0),
                                                            (41, "after step 24", 17, 3)])
def test_what_a_run_has_done_is_not_counted(launch, uninterrupted, fullbatch_arguments, steps, checkpoint, left, saves):
    folder = uninterrupted / "checkpoints"
    run = launch(*fullbatch_arguments, "--train-iters", steps, "--load", folder, "--save", folder, "--save-interval",
                 10, "--override-opt-param-scheduler", "--dry-run")
    assert run.code == 0 and f"data: {left} steps of 8 rows read {8 * left} rows, " in run.output, run.output[-2000:]
    assert str(find_iteration(folder)) in run.output and checkpoint in run.output
    assert f", {saves} saves take" in run.output
    assert ("schedule: steps 25 to 41 of" in run.output) == (left > 0) == ("schedule: steps" in run.output)


@pytest.mark.parametrize("flags, says", [
    (["--early-stopping", 3], "--early-stopping 3: has no effect without --save"),
    (["--eval-weights", "ema"], "--eval-weights ema: has no effect, nothing is evaluated"),
    (["--load-newest-valid"], "--load-newest-valid: there is no checkpoint to load"),
    (["--eval-tasks", "nonsense", "--eval-tasks-data", "."], "tasks are answered at every validation of a"),
    (["--load", "{0}", "--verify-integrity"], "--verify-integrity: {0}/iter_0000024 was saved without it"),
    (["--save", "{0}"], "--save {0}: holds iter_0000024 of another run"),
    (["--save", "{0}/iter_0000024/.metadata/run"], "cannot write to {0}/iter_0000024/.metadata; choose another folder"),
    (["--load", "{0}", "--save", "{0}", "--train-iters", 41], "trained with --train-iters 24 (the command line makes"),
])
def test_what_a_run_refuses_a_dry_run_refuses_too(launch, uninterrupted, fullbatch_arguments, flags, says):
    folder = uninterrupted / "checkpoints"
    before = written(uninterrupted)
    command = [*fullbatch_arguments, *(word.format(folder) if isinstance(word, str) else word for word in flags)]
    run, dry_run = launch(*command), launch(*command, "--dry-run")
    assert run.code == dry_run.code == 2 and run.errors == dry_run.errors, (run.output[-2000:], dry_run.output[-2000:])
    assert says.format(folder) in run.errors[0] and written(uninterrupted) == before


def test_what_a_run_says_of_its_start_a_dry_run_says_too(launch, uninterrupted, fullbatch_arguments, tmp_path):
    folder = shutil.copytree(uninterrupted / "checkpoints", tmp_path / "checkpoints")
    command = [*fullbatch_arguments, "--load", folder, "--save", folder, "--train-iters", 25, "--seed", 99,
               "--override-opt-param-scheduler", "--load-newest-valid", "--exit-interval", 13]
    shard = folder / "iter_0000024" / "__0_0.distcp"
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 100)
    before = written(folder)
    dry_run = launch(*command, "--dry-run")
    assert dry_run.code == 0 and written(folder) == before, dry_run.output[-3000:]
    run = launch(*command)
    assert run.code == 0 and complete_iterations(folder) == ["iter_0000012", "iter_0000013", "iter_0000024"], run.output
    for line in (r"checkpoint: the command line changes --seed from 1234 to 99$",
                 r"schedule: the command line's \(--override-opt-param-scheduler\)",
                 r"schedule: steps 13 to 25 .* at step 13; bp_steps",
                 r"checkpoint: .*iter_0000024/__0_0.distcp: .* bytes are there, .*going on from iter_0000012, "):
        for output in (run.output, dry_run.output):
            assert len(re.findall(f"^{line}", output, re.MULTILINE)) == 1, (line, output)
    assert f"checkpoint: begins from {folder}/iter_0000012, after step 12" in dry_run.output
    assert "log: " not in dry_run.output


def test_held_out_rows_are_planned_and_none_are_written(launch, store, tmp_path):  # noqa: F811
    command = ["--num-layers", 1, "--hidden-size", 32, "--num-attention-heads", 4, "--seq-length", 96, "--lr", 1e-3,
               "--global-batch-size", 2, "--epochs", 2, "--data-path", store, "--split", "80,20,0", "--dry-run"]
    run = launch(*command, "--data-cache-path", tmp_path / "rows")
    assert run.code == 0 and not [*tmp_path.iterdir()], run.output[-2000:]
    assert [line.split(": ")[1] for line in run.output.splitlines() if line.startswith("data: ")
            ][::2] == ["training", "validation"]


def arguments_of_saves(tmp_path, **given):
    return argparse.Namespace(**dict(save=str(tmp_path), save_interval=500, train_iters=50_000, most_recent_k=None,
                                     save_retain_interval=None, early_stopping=None, no_save_optim=None, lora_rank=None,
                                     params_dtype=torch.bfloat16) | given)


@pytest.mark.parametrize("given, done, bytes_each, saves, at_once", [
    ({}, 0, 18, 100, 100), (dict(no_save_optim=True), 0, 2, 100, 100), (dict(most_recent_k=2), 0, 18, 100, 3),
    (dict(most_recent_k=2), 49_500, 18, 1, 1), (dict(save_retain_interval=10_000), 0, 18, 100, 2 + 4),
    (dict(most_recent_k=3, save_retain_interval=20_000, early_stopping=5), 0, 18, 100, 4 + 2 + 1),
    (dict(save_interval=None), 0, 18, 1, 1), ({}, 50_000, 18, 0, 0)])
def test_flags_decide_how_much_the_checkpoints_take(tmp_path, given, done, bytes_each, saves, at_once):
    line = describe_space(arguments_of_saves(tmp_path, **given), ARCHITECTURE, done)
    gb = bytes_each * ARCHITECTURE.num_parameters / 1e9
    assert line.startswith(f"checkpoint: {gb:.2f} GB each, {saves} saves") and f" take {at_once * gb:,.2f} GB; " in line
    assert (f", of which {at_once} " in line) == (at_once < saves)


@pytest.mark.parametrize("given, there, wanted", [
    ({}, 0, 1), (dict(most_recent_k=2), 0, 3), (dict(most_recent_k=2), 2, 1), (dict(most_recent_k=2), 5, 1),
    (dict(most_recent_k=200), 0, 100), (dict(save_retain_interval=500), 1, 1)])
def test_a_run_wants_room_for_as_many_as_it_keeps_and_one_more(tmp_path, monkeypatch, given, there, wanted):
    for number in range(there):
        (tmp_path / f"iter_{number:07d}").mkdir()
        (tmp_path / f"iter_{number:07d}" / "manifest.json").touch()
    (tmp_path / "iter_0000900").mkdir()  # behind the step from which it goes on
    (tmp_path / "iter_0000900" / "manifest.json").touch()
    args, free = arguments_of_saves(tmp_path, **given), wanted * 18 * ARCHITECTURE.num_parameters
    monkeypatch.setattr(shutil, "disk_usage", lambda path: argparse.Namespace(free=free))
    check_space(args, ARCHITECTURE, 499)
    free -= 1
    what = "one checkpoint needs" if wanted == 1 else f"{wanted} checkpoints .* need"
    with pytest.raises(ConfigError, match=f"^--save {tmp_path}: {what} .* are free; free some space"):
        check_space(args, ARCHITECTURE, 499)


def test_the_program_answers_and_ends(launch, tmp_path):
    shown = launch("--hrm-preset", "XXXL", "--print-config", "--save", tmp_path / "a")
    assert shown.code == 0 and shown.output.startswith("preset XXXL: 5.60 B parameters")
    run = launch(*WORDS, "--seq-length", 96, "--global-batch-size", 2, "--sampled-data-path",
                 GOLDEN / "fullbatch" / "sampled", "--save", tmp_path / "b", "--tensorboard-dir", tmp_path / "c")
    assert run.code == 0 and "data: training: " in run.output, run.output[-2000:]
    assert "data: 4 steps of 2 rows read 8 rows, " in run.output and not [*tmp_path.iterdir()]
