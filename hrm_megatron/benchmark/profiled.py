"""Turn a user's run into a profiling run: from the same checkpoint, for a few steps, without saving."""
from __future__ import annotations

import argparse
from collections.abc import Sequence

from hrm_megatron.checkpoint.iterations import iteration_of
from hrm_megatron.training.bad_steps import ROLLBACK
from hrm_megatron.training.checkpoint import starting_point, starts_new
from hrm_megatron.training.finetune import settle_folders
from hrm_megatron.training.flags.table import by_flag
from hrm_megatron.training.flags.verdict import Used
from hrm_megatron.training.own_flags import full_parser

# Refused without --save, except the last, which would log to the user's own W&B run.
SAVING = ("--save", "--most-recent-k", "--early-stopping", "--hang-timeout-minutes", "--async-save",
          "--use-persistent-ckpt-worker", "--wandb-project")
GOING_BACK = ("--on-nonfinite", "--on-loss-spike", "--rollback-after")


def without_saves(flags: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return a run's flags without those about saving, and the removed ones.

    --load is removed too if it names the folder of --save and that is empty or belongs to a fine-tuning.
    """
    parser = full_parser()
    args, _ = parser.parse_known_args([*flags])
    left_out = {*SAVING}
    if ROLLBACK in (args.on_nonfinite, args.on_loss_spike):
        left_out.update(GOING_BACK)
    if args.load is not None and args.load == args.save and (args.finetune or starting_point(args) is None):
        left_out.add("--load")
    for flag, verdict in by_flag().items():
        if isinstance(verdict, Used) and verdict.needs and left_out.issuperset(verdict.needs.split()):
            left_out.add(flag)
    taken = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    for action in parser._actions:
        if left_out.intersection(action.option_strings):
            taken.add_argument(*action.option_strings, dest=action.option_strings[0], default=argparse.SUPPRESS,
                               **(dict(action="store_true") if action.nargs == 0 else dict(nargs=action.nargs)))
    found, others = taken.parse_known_args([*flags])
    return others, [f"{flag} {value}" if value is not True else flag for flag, value in vars(found).items()]


def first_iteration(flags: Sequence[str]) -> int:
    """Return the iteration that a run with these flags resumes from, 0 if it starts anew; raises ConfigError if it
    would refuse its checkpoint."""
    args, _ = full_parser().parse_known_args([*flags])
    settle_folders(args)
    folder = starting_point(args)
    return 0 if folder is None or starts_new(args, folder) else iteration_of(folder.name)


def last_iteration(start: int, first_step: int, steps: int) -> int:
    """Return the iteration at which the profiler and the run stop; profiling begins with step `first_step` of the
    process.

    torch's schedule counts the steps of the process and writes the trace one step after the last profiled one. In a
    resumed run Megatron, which counts iterations, stops the profiler before that.
    """
    return start + first_step + steps - (start > 0)
