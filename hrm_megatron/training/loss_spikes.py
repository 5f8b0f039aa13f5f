"""Detect loss spikes: warn about each and, after N consecutive ones, roll back as for non-finite gradients.

A loss is a spike if it lies more than seven standard deviations above the previous losses, the threshold of OLMo 2's
spike score (arXiv 2501.00656). A spike would itself move mean and standard deviation, so both are replaced by robust
estimates: the median, and 1.4826 times the median absolute deviation (Rousseeuw and Croux 1993), which equals the
standard deviation for normally distributed losses. Both hold while less than half of the previous losses are spikes; a
lasting new level is not a spike. The loss history is saved in a checkpoint's arguments, so that a run that resumes on
the same data continues it.
"""
from __future__ import annotations

import argparse
import functools
import logging
import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from megatron.training import training as megatron_training

from hrm_megatron.training.bad_steps import IGNORE, ROLLBACK, go_back, warn_once
from hrm_megatron.training.resume import trains_on_the_same

DEVIATIONS = 7  # OLMo 2
WINDOW, FEWEST = 128, 32  # number of previous losses; few enough that the trend is small compared to the noise
NORMAL = 1.4826  # standard deviation / median absolute deviation of a normal distribution, 1 / 0.6745
LEAST = 0.01  # least deviation as a fraction of the median: a rise below 7 % is never a spike
DATA = ("data_path", "train_data_path", "sampled_data_path", "sampling_rules")  # for checkpoints without digests

log = logging.getLogger(__name__)


class Spikes:
    """The loss history, in `args.losses_before`, and the current run of consecutive spikes."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.in_a_row: list[int] = []

    @property
    def before(self) -> list[float]:
        found: list[float] = getattr(self.args, "losses_before", [])
        return found

    def bound(self) -> float:
        """Return the largest loss that is not a spike."""
        if len(self.before) < FEWEST:
            return float("inf")
        median = statistics.median(self.before)
        distance = statistics.median(abs(loss - median) for loss in self.before)
        return median + DEVIATIONS * max(NORMAL * distance, LEAST * median)

    def note(self, step: int, loss: float) -> str | None:
        """Record a step's loss; return a message if it is a spike or not finite, else None."""
        if not math.isfinite(loss):
            self.in_a_row.append(step)
            return f"loss {loss} is no finite number ({len(self.in_a_row)} in a row)"
        bound, before = self.bound(), self.before
        self.args.losses_before = [*before, loss][-WINDOW:]
        if loss <= bound:
            self.in_a_row = []
            return None
        self.in_a_row.append(step)
        return (f"loss {loss:.4f} is a spike: above {bound:.4f}, {DEVIATIONS} robust deviations over the median "
                f"{statistics.median(before):.4f} of {len(before)} steps before ({len(self.in_a_row)} in a "
                "row)")


def take_losses(args: argparse.Namespace, stored: argparse.Namespace) -> None:
    """Continue the loss history of a checkpoint if a policy uses it and the data are the same: losses on other data may
    have another level."""
    if (same_data := trains_on_the_same(stored, args)) is None:
        same_data = all(getattr(stored, name, None) == getattr(args, name, None) for name in DATA)
    same = same_data and getattr(stored, "loss_on_prefix", None) == args.loss_on_prefix
    args.losses_before = getattr(stored, "losses_before", []) if same and args.on_loss_spike != IGNORE else []


def loss_of_step(losses: dict[str, torch.Tensor]) -> float:
    """Return the loss of a step on all ranks, by a maximum: only the last pipeline stage has it, others send -1."""
    mine = losses.get("lm loss")
    device = f"cuda:{torch.cuda.current_device()}"
    loss = torch.full((), -1.0, device=device) if mine is None else mine.detach().float().reshape(()).clone()
    torch.distributed.all_reduce(loss, torch.distributed.ReduceOp.MAX)
    return float(loss)


def install_loss_spikes(args: argparse.Namespace) -> None:
    """Check the loss of each applied step, unless --on-loss-spike is ignore."""
    if args.on_loss_spike == IGNORE:
        return
    spikes, stock = Spikes(args), megatron_training.training_log

    @functools.wraps(stock)
    def training_log(losses: dict[str, torch.Tensor], totals: dict[str, Any], lr: float | None, iteration: int,
                     loss_scale: float, report_memory: bool, skipped: int, *rest: Any, **options: Any) -> bool:
        logged: Callable[..., bool] = stock
        report_memory = logged(losses, totals, lr, iteration, loss_scale, report_memory, skipped, *rest, **options)
        if not skipped and (spike := spikes.note(iteration, loss_of_step(losses))):
            warn_once(f"step {iteration}: {spike}")
            if args.on_loss_spike == ROLLBACK and len(spikes.in_a_row) >= args.rollback_after:
                go_back(args, spikes.in_a_row, "the loss is a spike")
        return report_memory
    megatron_training.training_log = training_log
