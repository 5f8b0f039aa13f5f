"""Tune roundings and scales of all matrices jointly, against the full model's output distribution."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from hrm_megatron.config import Architecture
from hrm_megatron.convert.low_bit import LowBit, stored_scale
from hrm_megatron.quantize.recurrence import Recurrence, Rows, Weights
from hrm_megatron.quantize.rounding import Rounded

LARGEST_OFFSET = 0.5  # in units of a code: rounding may go up or down, as in AutoRound (arXiv 2309.05516)
SAID_STEPS = 20


@dataclass(frozen=True)
class Tuning:
    """Number of tuning steps, and the learning rates of offsets and scales, which decay linearly to zero."""

    steps: int = 200
    offset_lr: float = 1e-3
    scale_lr: float = 3e-4


class TunedMatrix:
    """A matrix whose unrounded numbers may move by half a code, and whose scales by a factor.

    Gradients pass through the rounding unchanged (straight-through estimator).
    """

    def __init__(self, rounded: Rounded) -> None:
        matrix = rounded.matrix
        self.scheme, self.scales = matrix.scheme, matrix.scales
        # Unrounded numbers may lie far outside the range of codes, where no small offset has an effect.
        self.steps = rounded.steps.clamp(self.scheme.smallest, self.scheme.largest)
        self.offset = torch.zeros_like(self.steps, requires_grad=True)
        self.factor = torch.ones_like(self.scales, requires_grad=not self.scheme.is_float)

    def matrix(self) -> LowBit:
        """Return the matrix in its current state."""
        codes = self.scheme.nearest(self.steps + self.offset.detach()).to(torch.int8)
        scales = self.scales if self.scheme.is_float else stored_scale(self.scales * self.factor.detach())
        return LowBit(codes, scales, self.scheme)

    def take_gradient(self, grad: torch.Tensor) -> None:
        """Convert the gradient [out, in] of the dequantized matrix to gradients of offsets and factors."""
        matrix = self.matrix()
        grouped = grad.unflatten(1, (matrix.scales.shape[1], -1))
        self.offset.grad = (grouped * (matrix.scales.unsqueeze(-1) * self.scheme.unit)).flatten(1)
        if self.factor.requires_grad:
            codes = matrix.codes.float().unflatten(1, (matrix.scales.shape[1], -1))
            self.factor.grad = (grouped * codes).sum(-1) * self.scales * self.scheme.unit

    def keep_in_bounds(self) -> None:
        self.offset.data.clamp_(-LARGEST_OFFSET, LARGEST_OFFSET)


def divergence(full_logits: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Return KL(full || quantized) per position, [n] in nats, from logits [n, v]."""
    return F.kl_div(logits.float().log_softmax(-1), full_logits.float().log_softmax(-1), reduction="none",
                    log_target=True).sum(-1)


def tune(architecture: Architecture, full: Weights, fixed: Weights, rounded: Mapping[str, Rounded],
         calibration: Iterator[Rows], tuning: Tuning,
         say: Callable[[str], object] = lambda line: None) -> dict[str, LowBit]:
    """Tune the matrices for `tuning.steps` batches of the endless `calibration`; `fixed` are all other weights.

    Gradients flow back through all ticks.
    """
    tuned = {name: TunedMatrix(each) for name, each in rounded.items()}
    groups: list[dict[str, Any]] = [
        dict(params=[each.offset for each in tuned.values()], lr=tuning.offset_lr),
        dict(params=[each.factor for each in tuned.values() if each.factor.requires_grad], lr=tuning.scale_lr)]
    optimizer = torch.optim.Adam([group for group in groups if group["params"]])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / max(tuning.steps, 1))
    reference = Recurrence(architecture, full)
    for step, rows in zip(range(1, tuning.steps + 1), calibration, strict=False):
        with torch.no_grad():
            expected = reference.label_logits(reference.states(rows), rows)
        weights = {name: each.matrix().dequantized().requires_grad_() for name, each in tuned.items()}
        model = Recurrence(architecture, {**fixed, **weights})
        loss = divergence(expected, model.label_logits(model.states(rows), rows)).mean()
        loss.backward()
        for name, each in tuned.items():
            grad = weights[name].grad
            assert grad is not None, name
            each.take_gradient(grad)
        optimizer.step()
        schedule.step()
        for each in tuned.values():
            each.keep_in_bounds()
        if step % SAID_STEPS == 0 or step == tuning.steps:
            say(f"tuned: step {step} of {tuning.steps}, KL {loss.item():.5f}")
    return {name: each.matrix() for name, each in tuned.items()}
