"""Metrics of a micro-batch: sums and counts that Megatron adds up over micro-batches and replicas."""
from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from hrm_megatron.data.batch import PackedBatch

Report = dict[str, torch.Tensor]  # name to [numerator, denominator]
SPEED = "tokens per second"  # key in training reports


def loss_sums(batch: PackedBatch, scores: torch.Tensor,
              context_group: Any = None) -> tuple[torch.Tensor, torch.Tensor, Report]:
    """Reduce the scores [2, n] of HRMModel to (sum of losses, count of labels, report).

    With `--calculate-per-token-loss` Megatron divides gradients by the count over all ranks and micro-batches:
    the token mean of the global batch. An example is exactly right if all its labels are, including those on other
    ranks of `context_group`; each of these ranks reports its share of the examples.
    """
    losses, correct = scores[0], scores[1].detach()  # an attached report would keep the graph alive
    loss = losses.sum()
    wrong = correct.new_zeros(batch.num_examples).index_add_(0, batch.label_example, 1 - correct)
    ranks = 1
    if context_group is not None:
        torch.distributed.all_reduce(wrong, group=context_group)
        ranks = context_group.size()
    values = {
        "lm loss": (loss.detach(), losses.numel()),
        "accuracy": (correct.sum(), losses.numel()),
        "exact accuracy": ((wrong == 0).sum() / ranks, batch.num_examples / ranks),
    }
    report = {name: torch.stack((numerator.float(), filled(losses, denominator)))
              for name, (numerator, denominator) in values.items()}
    return loss, losses.new_full((), losses.numel(), dtype=torch.int), report


def filled(like: torch.Tensor, value: float) -> torch.Tensor:
    """Return an fp32 scalar on the device of `like`, by filling, which unlike a copy from the host does not
    synchronize."""
    return like.new_full((), value, dtype=torch.float32)


class ThroughputMeter:
    """Positions per wall-clock second over all replicas, as a numerator and a denominator."""

    def __init__(self, replicas: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.replicas, self.clock = replicas, clock
        self.last = clock()

    def restart(self) -> None:
        """Exclude the time up to now."""
        self.last = self.clock()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time of the block, which belongs to no step."""
        begun = self.clock()
        yield
        self.last += self.clock() - begun

    def lap(self, tokens: int) -> tuple[float, float]:
        """Return (`tokens` * replicas, seconds since the last lap); summed over micro-batches and replicas, that is
        (all positions * replicas, elapsed seconds * replicas)."""
        now = self.clock()
        seconds, self.last = now - self.last, now
        return float(tokens * self.replicas), seconds
