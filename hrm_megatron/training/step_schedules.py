"""Learning rate and gradient ticks of each step, from the arguments of a run or of a checkpoint."""
from __future__ import annotations

import argparse

from hrm_megatron.optim.schedule import BPSchedule, LRSchedule, lr_steps_of


def bp_schedule(args: argparse.Namespace) -> BPSchedule:
    # bp_schedule_iters is set if a checkpoint's schedule is kept (training.resume) in a longer or shorter run.
    total_steps = getattr(args, "bp_schedule_iters", None) or args.train_iters
    return BPSchedule(args.bp_min_steps, args.bp_max_steps, args.bp_warmup_fraction, total_steps)


def lr_schedule(args: argparse.Namespace) -> LRSchedule:
    return LRSchedule(args.lr, args.min_lr, *lr_steps_of(args))
