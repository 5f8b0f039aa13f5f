"""Learning rate and gradient ticks of each step, from the arguments of a run or of a checkpoint."""
from __future__ import annotations

import argparse

from hrm_megatron.optim.schedule import BPSchedule, LRSchedule


def bp_schedule(args: argparse.Namespace) -> BPSchedule:
    # The former where a checkpoint's schedule was kept (training.resume) and the run is to be longer or shorter.
    total_steps = getattr(args, "bp_schedule_iters", None) or args.train_iters
    return BPSchedule(args.bp_min_steps, args.bp_max_steps, args.bp_warmup_fraction, total_steps)


def lr_schedule(args: argparse.Namespace) -> LRSchedule:
    warmup_steps = args.lr_warmup_iters or (args.lr_warmup_samples or 0) // args.global_batch_size
    total_steps = args.lr_decay_iters or args.train_iters
    if args.lr_warmup_fraction:
        warmup_steps = int(args.lr_warmup_fraction * total_steps)
    return LRSchedule(args.lr, args.min_lr, warmup_steps, total_steps)
