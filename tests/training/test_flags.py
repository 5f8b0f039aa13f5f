"""The table of flags names every flag of the pinned Megatron, and the command line is held to it."""
import argparse
import ast
import importlib.util
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

from hrm_megatron.parallel.cpu import activate

activate()

from megatron.training import arguments as megatron_arguments  # noqa: E402

from hrm_megatron.config import ConfigError  # noqa: E402
from hrm_megatron.training.arguments import fill_from_preset  # noqa: E402
from hrm_megatron.training.flags.bounds import BOUNDS  # noqa: E402
from hrm_megatron.training.flags.check import check_flags  # noqa: E402
from hrm_megatron.training.flags.document import COMMAND, document  # noqa: E402
from hrm_megatron.training.flags.table import GROUPS, OURS, by_flag  # noqa: E402
from hrm_megatron.training.flags.values import check_profile, check_values  # noqa: E402
from hrm_megatron.training.flags.verdict import Harmless, Refused, Used  # noqa: E402
from hrm_megatron.training.own_flags import DEFAULTS, FORCED, WITHOUT_CUDA, checked, full_parser  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs" / "flags.md"
PARSER = full_parser()
ACTIONS = {action.option_strings[0]: action for action in PARSER._actions if action.option_strings}
TABLE = by_flag()
DEFAULT = vars(PARSER.parse_args([]))


def check(*words, cuda=False):
    words = [str(word) for word in words]
    check_flags(PARSER, words, cuda, {} if cuda else WITHOUT_CUDA)
    check_values(PARSER.parse_args(words), cuda)


def another(action):
    """Words after which the setting has another value than its default, or None where no word makes one."""
    if action.nargs == 0:
        on = getattr(action, "const", None)
        value = on if on is not None else not action.option_strings[0].startswith("--no-")
        return [] if value != DEFAULT[action.dest] else None
    default = DEFAULT[action.dest]
    same = getattr(TABLE[action.option_strings[0]], "same", ())
    for choice in action.choices or ():
        if choice not in (default, *same) and [choice] != default:
            return [getattr(choice, "name", str(choice))]
    kind = getattr(action.type, "__name__", "str")
    word = {"int": "7", "float": "0.375", "moe_freq_type": "7", "no_rope_freq_type": "7", "la_freq_type": "7",
            "tuple_type": "7", "_parse_cuda_graph_modules_arg": "attn", "bool": "True"}.get(kind, "x")
    return [word] * (action.nargs if isinstance(action.nargs, int) else 1)


def test_no_reason_denies_the_blends_that_there_are():
    for verdict in TABLE.values():
        if isinstance(verdict, Refused):
            assert "blends" not in verdict.why and "one indexed dataset" not in verdict.why, verdict


def test_the_table_and_the_parser_have_the_same_flags_group_by_group():
    theirs = {group.title: [a.option_strings[0] for a in group._group_actions] for group in PARSER._action_groups
              if group._group_actions and group.title not in (OURS, "options")}
    ours = {title: [flag for verdict in group for flag in verdict.flags.split()] for title, group in GROUPS.items()}
    assert {title: sorted(flags) for title, flags in ours.items()} \
        == {title: sorted(flags) for title, flags in theirs.items()}
    assert not [flag for flag, count in Counter(flag for flags in ours.values() for flag in flags).items() if count > 1]


def test_the_settings_that_make_an_hrm_are_the_defaults_of_their_flags():
    known = {action.dest for action in PARSER._actions}
    for name, value in (DEFAULTS | FORCED).items():
        assert DEFAULT[name] == value
    verdicts = {action.dest: TABLE[flag] for flag, action in ACTIONS.items() if flag in TABLE}
    assert not [name for name in FORCED if name in known and isinstance(verdicts[name], Used)]


@cache
def words_of(module):
    """Attributes and strings in the source of a module."""
    tree = ast.parse(Path(importlib.util.find_spec(module).origin).read_text())
    return {node.attr if isinstance(node, ast.Attribute) else node.value for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) or (isinstance(node, ast.Constant) and isinstance(node.value, str))}


@pytest.mark.parametrize("flag", [flag for flag, verdict in TABLE.items() if isinstance(verdict, Used)])
def test_a_used_flag_is_read_by_the_module_that_the_table_names(flag):
    verdict, dest = TABLE[flag], ACTIONS[flag].dest
    words = words_of(verdict.by)
    part = dest.removeprefix("train").removeprefix("valid").removeprefix("test")  # f"{name}_data_path"
    assert dest in words or (part == "_data_path" and part in words)
    assert all(needed.strip(",").partition("=")[0] in ACTIONS for needed in verdict.needs.split())
    if ACTIONS[flag].type in (int, float):
        assert flag in BOUNDS


def test_bounds_are_of_used_flags_and_allow_the_defaults():
    for flag, bounds in BOUNDS.items():
        assert flag not in TABLE or isinstance(TABLE[flag], Used)
        default = DEFAULT[ACTIONS[flag].dest]
        for number in default if isinstance(default, list) else [default]:
            assert bounds is None or number is None or bounds[0] <= number <= bounds[1], flag


@pytest.mark.parametrize("flag", [flag for flag, verdict in TABLE.items() if isinstance(verdict, Refused)])
def test_a_refused_flag_is_one_line_that_says_why_and_how_else(flag):
    verdict, action = TABLE[flag], ACTIONS[flag]
    words = another(action)
    if words is None:  # as --no-position-embedding: it can only ask for what is so
        pytest.fail(f"{flag} can only be given at its default: it is harmless")
    for name in action.option_strings[:1] if flag.startswith("--rl-") else action.option_strings:
        if name.startswith("--no-") and not flag.startswith("--no-"):
            continue  # the other half of a BooleanOptionalAction, which is its default
        with pytest.raises(ConfigError) as error:
            check(name, *words, cuda=True)
        assert str(error.value) == f"{' '.join([name, *words])}: {verdict.why}; {verdict.way_out}"


@pytest.mark.parametrize("flag", [flag for flag, verdict in TABLE.items() if isinstance(verdict, Harmless)])
def test_a_harmless_flag_passes(flag):
    check(flag, *(another(ACTIONS[flag]) or []))


def test_refused_flags_at_their_defaults_pass():
    words = []
    for flag, verdict in TABLE.items():
        default, action = DEFAULT[ACTIONS[flag].dest], ACTIONS[flag]
        if isinstance(verdict, Refused) and action.nargs != 0 and default not in (None, [], ""):
            values = default if isinstance(default, list | tuple) else [default]
            words += [flag, *(str(getattr(value, "name", value)) for value in values)]
    assert len(words) > 200 and "--hidden-dropout" in words and "--normalization" in words
    check(*words)


@pytest.mark.parametrize("words", [
    ["--swiglu", "--normalization", "RMSNorm", "--hidden-dropout", 0, "--attention-dropout=0", "--disable-bias-linear",
     "--untie-embeddings-and-output-weights", "--position-embedding-type", "rope", "--rope-type", "rope",
     "--use-rotary-position-embeddings", "--use-flash-attn", "--no-masked-softmax-fusion", "--use-mcore-models",
     "--rotary-base", 500_000, "--dataloader-type", "single", "--ckpt-format", "torch_dist", "--cp-comm-type", "p2p"],
    ["--hidden-dropout", 0.3, "--hidden-dropout", 0],  # the last one holds
    ["--no-rl-partial-rollouts"],
    ["--persistent-save-interval", 5, "--save", "somewhere"],
    ["--override-opt-param-scheduler", "--use-checkpoint-args", "--load", "somewhere"],
    ["--skip-train", "--full-validation"],
    ["--fp8-format", "hybrid", "--fp8-margin", 1],  # delayed scaling is the default
])
def test_what_an_hrm_is_anyway_may_be_said(words):
    check(*words)


@pytest.mark.parametrize("words, line", [
    (["--hidden-dropout", 0.1], "--hidden-dropout 0.1: an HRM has no dropout, as HRM-Text; leave it out"),
    (["--hidden-dropout=0.1"], "--hidden-dropout 0.1: an HRM has no dropout"),
    (["--num-experts", 8], "--num-experts 8: an HRM has no experts"),
    (["--kv-channels", 16], "--kv-channels 16: a head of an HRM is hidden size / attention heads wide"),
    (["--squared-relu"], "--squared-relu: the MLP of an HRM is SwiGLU"),
    (["--adam-eps", 1e-6], "--adam-eps 1e-06: AdamATan2 divides by nothing"),
    (["--window-size", "(3,4)"], "--window-size 3 4: "),
    (["--persistent-save-interval", 5], "--persistent-save-interval 5: has no effect without --save"),
    (["--disable-tp-comm-bulk-wgrad"], "--disable-tp-comm-bulk-wgrad: never run"),
    (["--no-yarn-correction-range-round-to-int"], "--no-yarn-correction-range-round-to-int: positions of an HRM"),
    (["--yaml-cfg", "x.yaml"], "--yaml-cfg x.yaml: a file of settings would pass by every check"),
    (["--optimizer", "adam"], "--optimizer adam: an HRM trains by AdamATan2"),
    (["--rerun-mode", "report_stats"], "--rerun-mode report_stats: choose one of disabled, validate_results"),
    (["--attention-backend", "local"], "--attention-backend local: choose one of auto, flash, fused, unfused"),
    (["--fp8-margin", 1], "--fp8-margin 1: has no effect without --fp8-format"),
    (["--fp8-format", "hybrid", "--fp8-recipe", "tensorwise", "--fp8-amax-history-len", 7],
     "--fp8-amax-history-len 7: has no effect without --fp8-recipe=delayed; give that too, or leave it out"),
    (["--fp8-format", "hybrid", "--no-fp8-wgrad"], "--no-fp8-wgrad: recipes of Transformer Engine no longer have th"),
    (["--fp8-param-gather"], "--fp8-param-gather: has no effect without --fp8-format; give that too"),
    (["--recompute-modules", "mlp"], "has no effect without --recompute-granularity or --recompute-activations"),
    (["--overlap-param-gather"], "--overlap-param-gather: has no effect without --overlap-grad-reduce"),
    (["--ddp-bucket-size", 4], "--ddp-bucket-size 4: has no effect without --overlap-grad-reduce"),
    (["--ckpt-step", 3, "--save", "x"], "--ckpt-step 3: has no effect without --load or --pretrained-checkpoint"),
    (["--exit-on-missing-checkpoint"], "--exit-on-missing-checkpoint: has no effect without --load or"),
    (["--exit-signal-handler", "--exit-signal-handler-for-training"],
     "--exit-signal-handler-for-training: it ends a run without a save, with exit code 0; give --exit-signal-handler"),
    (["--split", "1,1,0"], "--split 1,1,0: has no effect without --data-path"),
    (["--loss-scale", 128], "--loss-scale 128.0: has no effect without --fp16"),
    (["--profile", "--use-pytorch-profiler"], "--use-pytorch-profiler: has no effect without --tensorboard-dir"),
    (["--async-save"], "--async-save: has no effect without --use-persistent-ckpt-worker"),
    (["--async-save", "--use-persistent-ckpt-worker", "--async-strategy", "nvrx"],
     "--async-strategy nvrx needs the Python package nvidia-resiliency-ext"),
    (["--enable-ft-package"], "needs the Python package nvidia_resiliency_ext, which is not installed"),
    (["--wandb-project", "x"], "--wandb-project x: needs the Python package wandb, which is not installed; install it"),
    (["--wandb-exp-name", "x"], "--wandb-exp-name x: has no effect without --wandb-project"),
    (["--record-memory-history"], "--record-memory-history: needs a CUDA device, and there is none"),
    (["--profile"], "--profile: Nsight Systems needs a CUDA device"),
    (["--num-workers", 4], "--num-workers 4: on this machine, which has no GPU, it can only be 0"),
    (["--log-interval", 0], "--log-interval 0: must be at least 1"),
    (["--eval-interval", 0], "--eval-interval 0: must be at least 1"),
    (["--train-iters", -1], "--train-iters -1: must be at least 1"),
    (["--train-samples", 0], "--train-samples 0: must be at least 1"),
    (["--micro-batch-size", 0], "--micro-batch-size 0: must be at least 1"),
    (["--tensor-model-parallel-size", 0], "--tensor-model-parallel-size 0: must be at least 1"),
    (["--seed", 0], "--seed 0: must be at least 1 and at most 2147483647"),
    (["--seed", 2**32], "--seed 4294967296: must be at least 1 and at most 2147483647"),
    (["--hang-timeout-minutes", 0], "--hang-timeout-minutes 0.0: must be at least 0.1"),
    (["--adam-beta2", "nan"], "--adam-beta2 nan: must be at least 0 and less than 1"),
    (["--adam-beta1", 1], "--adam-beta1 1.0: must be at least 0 and less than 1"),
    (["--ema-decay", 2], "--ema-decay 2.0: must be at least 0 and at most 1"),
    (["--train-iters", 3, "--train-samples", 30], "--train-iters is incompatible with --train-samples"),
    (["--lr-warmup-fraction", 0.1, "--lr-warmup-iters", 3],
     "--lr-warmup-fraction is incompatible with --lr-warmup-iters"),
    (["--train-samples", 30, "--lr-warmup-iters", 3], "--train-samples is incompatible with --lr-warmup-iters"),
    (["--bf16", "--fp16"], "--bf16 is incompatible with --fp16"),
    (["--init-std", 0.3], "--init-std 0.3: has no effect with --init-scheme lecun_normal; give --init-scheme fixed_no"),
    (["--load", "x", "--dist-ckpt-strictness", "return_all"], "--dist-ckpt-strictness return_all: choose one of"),
    (["--exit-signal-handler", "--exit-signal", "SIGKILL"], "--exit-signal SIGKILL: choose one of SIGTERM, SIGINT"),
    (["--ddp-param-name-patterns-for-fp32-local-accumulation", "all", "--bf16"],
     "local-accumulation all: has no effect without --grad-reduce-in-bf16"),
    (["--overlap-grad-reduce", "--ddp-num-buckets", 2, "--ddp-bucket-size", 9],
     "--ddp-num-buckets is incompatible with --ddp-bucket-size"),
    (["--data-path", "a", "--data-path", "b"], "--data-path: is given twice, and only the last would count; write all"),
    (["--save="], "--save '': is empty; name a folder, or leave it out"),
    (["--tensorboard-dir", ""], "--tensorboard-dir '': is empty; name a folder"),
    (["--tensorboard-queue-size", 5], "--tensorboard-queue-size 5: has no effect without --tensorboard-dir"),
    (["--log-progress"], "--log-progress: has no effect without --save"),
    (["--test-mode"], "--test-mode: it checks norms of queries and keys, which an HRM does not have"),
    (["--bf16", "--grad-reduce-in-bf16", "--accumulate-allreduce-grads-in-fp32"],
     "--grad-reduce-in-bf16 is incompatible with --accumulate-allreduce-grads-in-fp32"),
    (["--save", "x", "--save-params-interval", 4, "--overlap-grad-reduce", "--overlap-param-gather"],
     "--save-params-interval is incompatible with --overlap-param-gather"),
    (["--recompute-granularity", "full"], "--recompute-granularity full: say which layers"),
    (["--save-retain-interval", 3, "--save-interval", 2, "--save", "x"],
     "--save-retain-interval 3: is no multiple of --save-interval 2"),
    (["--log-memory-interval", 15], "--log-memory-interval 15: is no multiple of --log-interval 10"),
    (["--nccl-communicator-config-path", "x"], "--nccl-communicator-config-path x: no such file"),
])
def test_one_line_in_place_of_silence_or_a_traceback(words, line):
    with pytest.raises(ConfigError, match=".") as error:
        check(*words)
    assert line in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("words, line", [
    (["--profile-step-start", 12], "--profile-step-end 12: must be more than --profile-step-start 12; give more"),
    (["--train-iters", 11], "--profile-step-end 12: the profile is written there, and the run ends at step 11"),
    (["--profile-ranks", 0, 2], "--profile-ranks 2: no such rank; choose among 0 to 1"),
    (["--skip-train"], "--profile: has no effect with --skip-train"),
])
def test_a_profile_that_nobody_would_write_is_refused(words, line):
    def settled(*more):
        args = PARSER.parse_args(["--profile", "--train-iters", "12", *map(str, more)])
        return argparse.Namespace(**vars(args) | dict(world_size=2))
    check_profile(settled())
    with pytest.raises(ConfigError, match=f"^{line}"):
        check_profile(settled(*words))


@pytest.mark.parametrize("positions", [32, 4096])
def test_positions_of_a_table_are_those_of_a_row(positions):
    args = PARSER.parse_args(["--hrm-preset", "B", "--seq-length", "64", "--micro-batch-size", "2",
                              "--max-position-embeddings", str(positions)])
    fill_from_preset(args)
    assert args.max_position_embeddings == 64


@pytest.mark.parametrize("flag", ["--tensorboard-dir", "--save", "--data-cache-path"])
def test_a_file_where_a_folder_should_be(flag, tmp_path):
    place = tmp_path / "file"
    place.write_text("x")
    with pytest.raises(ConfigError, match=f"^{flag} {place}: a file is there; name a folder$"):
        check(flag, place)


def test_wandb_needs_a_folder_and_a_name(monkeypatch):
    stock = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "wandb" or stock(name))
    with pytest.raises(ConfigError, match="--wandb-project x: there is no folder for its files; give --save or"):
        check("--wandb-project", "x")
    with pytest.raises(ConfigError, match="--wandb-project x: --wandb-exp-name is empty"):
        check("--wandb-project", "x", "--save", "y", "--wandb-exp-name", "")
    check("--wandb-project", "x", "--save", "y", "--wandb-exp-name", "z")


@pytest.mark.parametrize("words, line", [
    (["--train-iter", 3], "command line: unrecognized arguments: --train-iter 3; did you mean --train-iters?"),
    (["--lr", "fast"], "command line: argument --lr: invalid float value: 'fast'"),
    (["--moe-layer-freq", "[1"], "command line: argument --moe-layer-freq: invalid moe_freq_type value: '[1'"),
    (["--cuda-graph-modules", "x"], "command line: argument --cuda-graph-modules: invalid"),
])
def test_what_argparse_refuses_is_one_line_too(words, line):
    with pytest.raises(ConfigError) as error:
        check(*words)
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


def test_a_run_is_checked_before_anything_else(monkeypatch):
    monkeypatch.setattr("sys.argv", ["pretrain", "--yaml-cfg", "nowhere.yaml"])
    with pytest.raises(ConfigError, match="^--yaml-cfg nowhere.yaml: "):
        megatron_arguments.parse_args(checked)


@pytest.mark.parametrize("flag", ["--help", "--help-hrm"])
def test_help_exits_with_ours_first(flag, capsys):
    with pytest.raises(SystemExit) as end:
        PARSER.parse_args([flag])
    assert not end.value.code
    sections = " ".join(capsys.readouterr().out.split()).split("hrm_megatron")[-1] if flag == "--help-hrm" else \
        " ".join(capsys.readouterr().out.split("\n\n", 1)[1].split())
    ours, theirs = sections.find("--hrm-preset {B"), sections.find("--tensor-model-parallel-size TENSOR")
    assert 0 <= ours and (theirs < 0 if flag == "--help-hrm" else ours < theirs)
    if flag == "--help-hrm":
        assert "EMA of the weights (default: 0.9999)" in sections and "(default: None)" not in sections
    else:
        assert "10%)" in sections  # of --moe-paged-stash-buffer-size-factor-cuda, whose help argparse cannot print


def test_the_page_is_the_table():
    assert PAGE.read_text() == document(PARSER), f"print it again: {COMMAND}"
