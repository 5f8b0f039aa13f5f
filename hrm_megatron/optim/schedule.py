"""Learning rate and number of gradient ticks as plain functions of the step, counted from 1."""
from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from hrm_megatron.config import ConfigError


def as_fp32(value: float) -> float:
    """Return the nearest fp32 number."""
    rounded: float = struct.unpack("f", struct.pack("f", value))[0]
    return rounded


def lr_steps_of(args: Any) -> tuple[int, int]:
    """Return (warm-up steps, steps until the rate is constant) from the arguments of a run or a checkpoint."""
    total_steps = args.lr_decay_iters or args.train_iters or 1
    if args.lr_warmup_fraction:  # in decimal: 0.29 of 100 steps is 29, but 28.999... as a float
        return int(Fraction(str(args.lr_warmup_fraction)) * total_steps), total_steps
    return args.lr_warmup_iters or (args.lr_warmup_samples or 0) // args.global_batch_size, total_steps


@dataclass(frozen=True)
class LRSchedule:
    """Linear warm-up, then a cosine from `lr` to `min_lr` at `total_steps` (HRM-Text, cosine_schedule)."""

    lr: float
    min_lr: float
    warmup_steps: int
    total_steps: int

    def __post_init__(self) -> None:
        if not 0 <= self.min_lr <= self.lr:
            raise ConfigError(f"min_lr={self.min_lr} must lie between 0 and lr={self.lr}")
        if not 0 <= self.warmup_steps <= self.total_steps:
            raise ConfigError(f"warmup_steps={self.warmup_steps} must lie between 0 and total_steps="
                              f"{self.total_steps}: lower --lr-warmup-iters or train longer")

    def at(self, step: int) -> float:
        """Return the learning rate of this step, rounded to fp32; `min_lr` after `total_steps`.

        The reference never trains past `total_steps`, where its cosine would rise back to `lr`.
        """
        if step < self.warmup_steps:
            return as_fp32(self.lr * step / self.warmup_steps)
        min_ratio = self.min_lr / self.lr if self.lr else 1.0
        progress = min(1.0, (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps))
        cosine = max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
        return as_fp32(self.lr * (min_ratio + (1 - min_ratio) * cosine))


@dataclass(frozen=True)
class BPSchedule:
    """Linear increase of the gradient ticks from `min_steps` to `max_steps` during the first `warmup_fraction` of the
    run (HRM-Text, bp warm-up)."""

    min_steps: int
    max_steps: int
    warmup_fraction: float
    total_steps: int

    def __post_init__(self) -> None:
        if not 1 <= self.min_steps <= self.max_steps:
            raise ConfigError(f"bp_min_steps={self.min_steps}, bp_max_steps={self.max_steps}: need 1 <= min <= max")
        if not 0 <= self.warmup_fraction <= 1:
            raise ConfigError(f"bp_warmup_fraction={self.warmup_fraction} must lie between 0 and 1")

    def at(self, step: int) -> int:
        """Return the number of gradient ticks of this step."""
        warmup_steps = self.total_steps * self.warmup_fraction
        progress = min(1.0, step / warmup_steps) if warmup_steps else 1.0
        return self.min_steps + int(progress * (self.max_steps - self.min_steps))
