"""Rules for resuming from a checkpoint: whether anything is left, whether the model fits, which schedule is followed.

They compare two sets of arguments, the checkpoint's and the command line's, before anything is built.
"""
from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from hrm_megatron.config import Architecture, ConfigError
from hrm_megatron.data.sampled import SampledFolder
from hrm_megatron.optim.schedule import as_fp32
from hrm_megatron.training.step_schedules import bp_schedule, lr_schedule

# Field of Architecture to the property through which it affects the forward pass.
ENTERS_FORWARD = {
    **{name: name for name in ("model_type", "num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size",
                               "h_cycles", "l_cycles", "norm_placement", "h_norm_placement", "rope_theta",
                               "norm_epsilon", "attention_mask", "attention_gate")},
    "vocab_size": "padded_vocab_size",
    # They also decide the initial weights, which no longer matters.
    "init_scheme": "embedding_scale", "init_std": "embedding_scale",
}
# Argument to flag: what a resumed run may change, and would otherwise change silently.
CHANGEABLE = {"seed": "--seed", "seq_length": "--seq-length", "split": "--split", "data_path": "--data-path",
              "train_data_path": "--train-data-path", "sampling_rules": "--sampling-rules",
              "loss_on_prefix": "--loss-on-prefix", "adamw": "--adamw", "ema_decay": "--ema-decay",
              "adam_beta1": "--adam-beta1", "adam_beta2": "--adam-beta2"}
FIRST_PLAN_VERSION = 1  # of checkpoints that do not state the version of their row plan
OVERRIDE, KEEP = "--override-opt-param-scheduler", "--use-checkpoint-opt-param-scheduler"


def check_model(folder: Path, theirs: Architecture, ours: Architecture) -> None:
    """Refuse to load the weights of a different model."""
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
    """Refuse data of a different tokenizer, if the checkpoint states its own; checkpoints converted from other formats
    state only the number of embedding rows."""
    of_rows = any(args.vocab_size == args.padded_vocab_size for args in (theirs, ours))
    have, want = (getattr(args, "vocabulary", None) for args in (theirs, ours))
    if (theirs.vocab_size != ours.vocab_size and not of_rows) or (have and want and have != want):
        other = "others" if theirs.vocab_size == ours.vocab_size else str(ours.vocab_size)
        raise ConfigError(f"{folder}: was trained with the {theirs.vocab_size} tokens of its tokenizer, and the data "
                          f"are of one with {other}; preprocess them with its own")
    ours.vocabulary = want or have


def check_plan(folder: Path, theirs: argparse.Namespace, ours: argparse.Namespace) -> None:
    """Refuse to resume an order of rows that this version no longer plans."""
    have = getattr(theirs, "plan_version", FIRST_PLAN_VERSION)
    if have != ours.plan_version and theirs.seed == ours.seed:
        raise ConfigError(f"{folder}: its rows were planned by version {have} of the plan, here they are by version "
                          f"{ours.plan_version}: the next row would be another; go on with the version of hrm_megatron "
                          "that wrote it, or give another --seed to begin another order (what is left of this epoch is "
                          "then partly read twice, partly not at all)")


def settle_length(args: argparse.Namespace, theirs: argparse.Namespace, iteration: int) -> None:
    """Let a run over --epochs or --train-samples end when their rows are consumed, also if the batch size changed."""
    if args.match_flops_of or not (args.epochs or args.train_samples):
        return
    # In a converted checkpoint the count is 0; Megatron then assumes the command line's batch size for past steps.
    read = theirs.consumed_train_samples or iteration * args.global_batch_size
    left = (args.rows_of_epochs or args.train_samples) - read
    whole = math.ceil if args.epochs else math.floor
    if -max(args.global_batch_size, theirs.global_batch_size) < left < 0:  # the last step had rows to spare
        left = 0
    args.train_iters = iteration + whole(left / args.global_batch_size)
    if not theirs.consumed_train_samples:
        args.train_samples = None  # without a count of rows Megatron accepts only steps


def length_asked(args: argparse.Namespace) -> str:
    """Return the flag that says how long the run is, with its value."""
    name = next((name for name in ("match_flops_of", "epochs", "train_samples") if getattr(args, name)), "train_iters")
    return f"--{name.replace('_', '-')} {getattr(args, name)}"


def nothing_left(iteration: int, train_iters: int, evaluates: str = "--skip-train evaluates it",
                 asked: str = "") -> str | None:
    """Return one line that says that a run at this iteration is done, what `evaluates` it, and the flag that `asked`
    for fewer iterations; None if iterations are left."""
    if iteration < train_iters:
        return None
    if iteration == train_iters:
        return f"iteration {iteration} of {train_iters} is done, nothing to train ({evaluates})"
    return f"iteration {iteration} is done, nothing to train: {asked or f'--train-iters {train_iters}'} asks for fewer"


def context_of(args: argparse.Namespace) -> int:
    """Return the longest context in tokens that the model of a run, or of a checkpoint, was trained on."""
    return getattr(args, "context_tokens", 0) or int(args.seq_length)


def digest_of_data(args: argparse.Namespace, part: str) -> Any:
    """Return the digest of a part of the data of a run or of a checkpoint, of `epochs` a list; None if unknown."""
    return getattr(args, "data_digests", {}).get(part)


def trains_on_the_same(theirs: argparse.Namespace, ours: argparse.Namespace) -> bool | None:
    """Tell whether two runs train on the same data, as far as `ours` reads the epochs of a sampled folder; None if
    unknown, as for checkpoints of older versions."""
    pairs = [(digest_of_data(theirs, part), digest_of_data(ours, part)) for part in ("train", "tokens")]
    known = [one == other for one, other in pairs if one and other]
    have, want = (digest_of_data(args, "epochs") for args in (theirs, ours))
    if have and want:  # stored epochs start over after the last
        known.append(have == want or all(have[epoch % len(have)] == want[epoch % len(want)]
                                         for epoch in range(_epochs_read(theirs, ours))))
    return all(known) if known else None


def _epochs_read(theirs: argparse.Namespace, ours: argparse.Namespace) -> int:
    """Return how many epochs of a sampled folder a run reads at most: rows without padding would hold so many."""
    if ours.epochs:
        return int(ours.epochs)
    rows = ours.train_iters * max(theirs.global_batch_size, ours.global_batch_size)
    return math.ceil(rows * ours.seq_length / SampledFolder(ours.sampled_data_path).fewest_positions())


def changes(theirs: argparse.Namespace, ours: argparse.Namespace) -> str | None:
    """Return one line about settings and data that differ from the run that saved the checkpoint, or None."""
    def value(args: argparse.Namespace, name: str) -> object:
        if name in ("data_path", "train_data_path"):
            paths = getattr(args, name, None) or []
            both = getattr(theirs, name, None) and getattr(ours, name, None)
            return " ".join(paths) if both or len(paths) > 1 else None
        if name != "split":
            return getattr(args, name, None) or None  # checkpoints of older versions lack some flags
        # It splits the examples of --data-path; Megatron's default contains blanks.
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
    """Return flag to value of all that decides learning rate, weight decay, gradient ticks and rows of each step, with
    durations in iterations."""
    lr, bp = lr_schedule(args), bp_schedule(args)
    return {"--lr": lr.lr, "--min-lr": lr.min_lr, "--lr-warmup-iters": lr.warmup_steps, "--train-iters": bp.total_steps,
            "--lr-decay-iters": lr.total_steps, "--weight-decay": args.weight_decay, "--bp-min-steps": bp.min_steps,
            "--bp-max-steps": bp.max_steps, "--bp-warmup-fraction": bp.warmup_fraction,
            "--global-batch-size": args.global_batch_size}


def differences(theirs: argparse.Namespace, ours: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Return flag to (checkpoint's value, command line's value) of the schedule settings that differ."""
    wanted = schedule_settings(ours)
    pairs = {flag: (value, wanted[flag]) for flag, value in schedule_settings(theirs).items()}
    if pairs["--lr-decay-iters"] == pairs["--train-iters"]:  # its default
        del pairs["--lr-decay-iters"]
    return {flag: pair for flag, pair in pairs.items() if pair[0] != pair[1]}


def settle_schedule(args: argparse.Namespace, theirs: argparse.Namespace, folder: Path) -> str | None:
    """Set the schedule in `args` that the run follows from `folder` on: the checkpoint's or the command line's, as a
    flag decides.

    Returns a line for the log, or None if the two are equal; raises ConfigError if they differ and no flag is given.
    """
    differing = differences(theirs, args)
    if not differing:
        return None
    if not (args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler):
        asked = length_asked(args)
        made_by = {} if asked.startswith("--train-iters") else {"--train-iters": f" by {asked}"}
        listed = ", ".join(f"{flag} {have} (the command line makes {want}{made_by.get(flag, '')})"
                           for flag, (have, want) in differing.items())
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
