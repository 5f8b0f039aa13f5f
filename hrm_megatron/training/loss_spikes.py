"""Losses that jump: named, and after several in a row gone back from as from gradients that are not finite.

A loss is a spike if it lies seven standard deviations above what came before, as OLMo 2 counts them (arXiv 2501.00656,
spike score). Its mean and deviation would themselves be moved by a spike, so both are robust here: the median of the
losses before, and 1.4826 times the median distance from it (Rousseeuw and Croux 1993), which is the standard deviation
where losses are normal. Both hold while less than half of the losses before are spikes; a level that stays is none. The
losses before are among the arguments that a checkpoint holds, so that a start on the same data goes on with them.
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
WINDOW, FEWEST = 128, 32  # losses before: of few enough steps that the trend of a run is small beside its noise
NORMAL = 1.4826  # standard deviations in a median distance, 1 / 0.6745
LEAST = 0.01  # deviation as a share of the median: a rise below 7 % is no spike, however quiet the losses before
DATA = ("data_path", "train_data_path", "sampled_data_path", "sampling_rules")  # of checkpoints without digests

log = logging.getLogger(__name__)


class Spikes:
    """The losses before, those of `args.losses_before`, and the steps in a row that are spikes."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.in_a_row: list[int] = []

    @property
    def before(self) -> list[float]:
        found: list[float] = getattr(self.args, "losses_before", [])
        return found

    def bound(self) -> float:
        """Return the largest loss that is no spike."""
        if len(self.before) < FEWEST:
            return float("inf")
        median = statistics.median(self.before)
        distance = statistics.median(abs(loss - median) for loss in self.before)
        return median + DEVIATIONS * max(NORMAL * distance, LEAST * median)

    def note(self, step: int, loss: float) -> str | None:
        """Take a step's loss; say what is wrong with it, if anything is."""
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
    """Go on with the losses that a checkpoint was saved behind, where a policy asks for them and they are of the same
    data: others may have another level."""
    if (same_data := trains_on_the_same(stored, args)) is None:
        same_data = all(getattr(stored, name, None) == getattr(args, name, None) for name in DATA)
    same = same_data and getattr(stored, "loss_on_prefix", None) == args.loss_on_prefix
    args.losses_before = getattr(stored, "losses_before", []) if same and args.on_loss_spike != IGNORE else []


def loss_of_step(losses: dict[str, torch.Tensor]) -> float:
    """Return the loss of a step on all ranks; the last stage of a pipeline alone has it, and no loss is negative."""
    mine = losses.get("lm loss")
    device = f"cuda:{torch.cuda.current_device()}"
    loss = torch.full((), -1.0, device=device) if mine is None else mine.detach().float().reshape(()).clone()
    torch.distributed.all_reduce(loss, torch.distributed.ReduceOp.MAX)
    return float(loss)


def install_loss_spikes(args: argparse.Namespace) -> None:
    """Look at the loss of each step that was taken, where a policy asks for it."""
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
