"""Going on from a checkpoint: whether there is anything left, whose model it is, and which schedule the rest follows.

Plain rules over two sets of arguments, the checkpoint's and the command line's. All of it is settled before anything is
built.
"""
from __future__ import annotations

import argparse
import math
from pathlib import Path

from hrm_megatron.config import Architecture, ConfigError
from hrm_megatron.optim.schedule import as_fp32
from hrm_megatron.training.step_schedules import bp_schedule, lr_schedule

# Field of Architecture > the property through which it enters the function that the weights stand for.
ENTERS_FORWARD = {
    **{name: name for name in ("model_type", "num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size",
                               "h_cycles", "l_cycles", "norm_placement", "h_norm_placement", "rope_theta",
                               "norm_epsilon", "attention_mask", "attention_gate")},
    "vocab_size": "padded_vocab_size",
    # Beside how the first weights are drawn, which does not matter any more.
    "init_scheme": "embedding_scale", "init_std": "embedding_scale",
}
# What a run may change as it goes on, and would change silently: argument > flag.
CHANGEABLE = {"seed": "--seed", "seq_length": "--seq-length", "split": "--split", "data_path": "--data-path",
              "train_data_path": "--train-data-path", "sampling_rules": "--sampling-rules",
              "loss_on_prefix": "--loss-on-prefix", "adamw": "--adamw", "ema_decay": "--ema-decay",
              "adam_beta1": "--adam-beta1", "adam_beta2": "--adam-beta2"}
FIRST_PLAN_VERSION = 1  # of checkpoints that do not say by which version their rows were planned
OVERRIDE, KEEP = "--override-opt-param-scheduler", "--use-checkpoint-opt-param-scheduler"


def check_model(folder: Path, theirs: Architecture, ours: Architecture) -> None:
    """Refuse to put the weights of one model into another."""
    for name in dict.fromkeys(ENTERS_FORWARD.values()):
        have, want = getattr(theirs, name), getattr(ours, name)
        if isinstance(have, float):  # the model computes in fp32 at most
            have, want = as_fp32(have), as_fp32(want)
        if have != want:
            hint = (f" (it was trained with --init-scheme {theirs.init_scheme}, --init-std {theirs.init_std})"
                    if name == "embedding_scale" else "")
            raise ConfigError(f"{folder}: its model has {name}={getattr(theirs, name)}, the command line makes "
                              f"{getattr(ours, name)}{hint}; train with its sizes (--use-checkpoint-args takes them "
                              "from there), or give another --load")


def check_vocabulary(folder: Path, theirs: argparse.Namespace, ours: argparse.Namespace) -> None:
    """Refuse data of another tokenizer, whose ids mean other rows of the embedding; as far as a checkpoint knows them:
    other formats tell rows only."""
    of_rows = any(args.vocab_size == args.padded_vocab_size for args in (theirs, ours))
    have, want = (getattr(args, "vocabulary", None) for args in (theirs, ours))
    if (theirs.vocab_size != ours.vocab_size and not of_rows) or (have and want and have != want):
        other = "others" if theirs.vocab_size == ours.vocab_size else str(ours.vocab_size)
        raise ConfigError(f"{folder}: was trained with the {theirs.vocab_size} tokens of its tokenizer, and the data "
                          f"are of one with {other}; preprocess them with its own")
    ours.vocabulary = want or have


def check_plan(folder: Path, theirs: argparse.Namespace, ours: argparse.Namespace) -> None:
    """Refuse to go on in the middle of an order of rows that this version does not plan any more."""
    have = getattr(theirs, "plan_version", FIRST_PLAN_VERSION)
    if have != ours.plan_version and theirs.seed == ours.seed:
        raise ConfigError(f"{folder}: its rows were planned by version {have} of the plan, here they are by version "
                          f"{ours.plan_version}: the next row would be another; go on with the version of hrm_megatron "
                          "that wrote it, or give another --seed to begin another order (what is left of this epoch is "
                          "then partly read twice, partly not at all)")


def settle_length(args: argparse.Namespace, theirs: argparse.Namespace, iteration: int) -> None:
    """Let a run over --epochs or --train-samples end when their rows are read, whatever rows its steps had before."""
    if args.match_flops_of or not (args.epochs or args.train_samples):
        return
    # Of a converted checkpoint the count is 0, which Megatron takes for steps of the command line's rows.
    read = theirs.consumed_train_samples or iteration * args.global_batch_size
    left = (args.rows_of_epochs or args.train_samples) - read
    whole = math.ceil if args.epochs else math.floor
    args.train_iters = iteration + max(0, whole(left / args.global_batch_size))
    if not theirs.consumed_train_samples:
        args.train_samples = None  # without a count of rows Megatron takes nothing but steps


def nothing_left(iteration: int, train_iters: int, evaluates: str = "--skip-train evaluates it") -> str | None:
    """Say in one line that a run which has come this far is done, and what `evaluates` it; None where it has iterations
    left."""
    if iteration < train_iters:
        return None
    if iteration == train_iters:
        return f"iteration {iteration} of {train_iters} is done, nothing to train ({evaluates})"
    return f"iteration {iteration} is done, nothing to train: --train-iters {train_iters} asks for fewer"


def context_of(args: argparse.Namespace) -> int:
    """Return how many tokens the model of a run, or of one that wrote a checkpoint, has learned to read at most."""
    return getattr(args, "context_tokens", 0) or int(args.seq_length)


def digest_of_data(args: argparse.Namespace, part: str) -> str | None:
    """Return what tells the data of a run, or of one that wrote a checkpoint, from others; None where nobody knows."""
    found: str | None = getattr(args, "data_digests", {}).get(part)
    return found


def trains_on_the_same(theirs: argparse.Namespace, ours: argparse.Namespace) -> bool | None:
    """Tell whether two runs train on the same data; None where nobody knows, as of checkpoints of older versions."""
    pairs = [(digest_of_data(theirs, part), digest_of_data(ours, part)) for part in ("train", "sampled")]
    known = [one == other for one, other in pairs if one and other]
    return all(known) if known else None


def changes(theirs: argparse.Namespace, ours: argparse.Namespace) -> str | None:
    """Say in one line which rows or averages are others than in the run that wrote the checkpoint."""
    def value(args: argparse.Namespace, name: str) -> object:
        if name in ("data_path", "train_data_path"):
            paths = getattr(args, name, None) or []
            both = getattr(theirs, name, None) and getattr(ours, name, None)
            return " ".join(paths) if both or len(paths) > 1 else None
        if name != "split":
            return getattr(args, name, None) or None  # a checkpoint of an older version does not know every flag
        # Of the examples of --data-path; Megatron's default has blanks in it.
        return args.split.replace(" ", "") if theirs.data_path and ours.data_path else None

    def shown(args: argparse.Namespace, name: str) -> object:
        given = getattr(args, name, None)
        return " ".join(given) if isinstance(given, list) else given

    found = [f"{flag} from {shown(theirs, name)} to {shown(ours, name)}" for name, flag in CHANGEABLE.items()
             if value(theirs, name) != value(ours, name)]
    if found:
        return f"the command line changes {', '.join(found)}"
    if trains_on_the_same(theirs, ours) is False:
        return ("the data are not those it was trained on: their examples, or how they are mixed, have changed, and so "
                "has the order of rows")
    return None


def schedule_settings(args: argparse.Namespace) -> dict[str, float]:
    """What decides learning rate, decay, gradient ticks and rows of each step: flag > value, times in iterations."""
    lr, bp = lr_schedule(args), bp_schedule(args)
    return {"--lr": lr.lr, "--min-lr": lr.min_lr, "--lr-warmup-iters": lr.warmup_steps, "--train-iters": bp.total_steps,
            "--lr-decay-iters": lr.total_steps, "--weight-decay": args.weight_decay, "--bp-min-steps": bp.min_steps,
            "--bp-max-steps": bp.max_steps, "--bp-warmup-fraction": bp.warmup_fraction,
            "--global-batch-size": args.global_batch_size}


def differences(theirs: argparse.Namespace, ours: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Flag > (checkpoint's value, command line's value) of the settings of the schedule that differ."""
    wanted = schedule_settings(ours)
    pairs = {flag: (value, wanted[flag]) for flag, value in schedule_settings(theirs).items()}
    if pairs["--lr-decay-iters"] == pairs["--train-iters"]:  # it is that unless given by hand
        del pairs["--lr-decay-iters"]
    return {flag: pair for flag, pair in pairs.items() if pair[0] != pair[1]}


def settle_schedule(args: argparse.Namespace, theirs: argparse.Namespace, folder: Path) -> str | None:
    """Let `args` hold the schedule that the run follows from `folder` on: theirs, or as a flag says.

    Returns a line for the log where the two differ and a flag decides; raises ConfigError where none does.
    """
    differing = differences(theirs, args)
    if not differing:
        return None
    if not (args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler):
        listed = ", ".join(f"{flag} {have} (the command line makes {want})" for flag, (have, want) in differing.items())
        raise ConfigError(f"{folder}: trained with {listed}: give {OVERRIDE} to go on by the command line's schedule, "
                          f"{KEEP} to go on by the checkpoint's (with the command line's rows per step), or its values")
    whose, flag = "the command line's", OVERRIDE
    if args.use_checkpoint_opt_param_scheduler:
        whose, flag = "the checkpoint's", KEEP
        _take_schedule(args, theirs)
    return (f"schedule: {whose} ({flag}); learning rate and gradient ticks count iterations, whatever the rows per "
            "step")


def _take_schedule(args: argparse.Namespace, theirs: argparse.Namespace) -> None:
    lr = lr_schedule(theirs)
    args.lr, args.min_lr, args.lr_warmup_iters, args.lr_decay_iters = lr.lr, lr.min_lr, lr.warmup_steps, lr.total_steps
    args.lr_warmup_fraction, args.lr_warmup_samples = None, 0
    args.weight_decay, args.bp_schedule_iters = theirs.weight_decay, bp_schedule(theirs).total_steps
    args.bp_min_steps, args.bp_max_steps, args.bp_warmup_fraction = (
        theirs.bp_min_steps, theirs.bp_max_steps, theirs.bp_warmup_fraction)
