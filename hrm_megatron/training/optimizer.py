"""Hand AdamATan2 and the step-exact schedules to Megatron's training loop."""
from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from megatron.training import training as megatron_training

from hrm_megatron.optim.builder import StepScheduler, build_optimizer
from hrm_megatron.training.step import TrainingStep
from hrm_megatron.training.step_schedules import lr_schedule


def install(args: argparse.Namespace, step: TrainingStep) -> None:
    """Replace the two functions by which the loop builds its optimizer and its scheduler."""
    def get_optimizer_param_scheduler(optimizer: Any) -> StepScheduler:
        return StepScheduler(optimizer, lr_schedule(args), args.global_batch_size, args.weight_decay, step.running_step)

    megatron_training.get_megatron_optimizer = partial(
        build_optimizer, ema_decay=args.ema_decay, embedding_has_gradient=step.embedding_has_gradient,
        adamw=args.adamw)
    megatron_training.get_optimizer_param_scheduler = get_optimizer_param_scheduler
