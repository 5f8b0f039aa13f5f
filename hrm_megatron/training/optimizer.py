"""Install AdamATan2 and the step-exact schedules in Megatron's training loop."""
from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from typing import Any

from megatron.training import training as megatron_training

from hrm_megatron.optim.builder import StepScheduler, build_optimizer
from hrm_megatron.training.step import TrainingStep
from hrm_megatron.training.step_schedules import lr_schedule


def install_optimizer(args: argparse.Namespace, step: TrainingStep, users: Iterable[Callable[[Any], None]]) -> None:
    """Replace Megatron's optimizer and LR-scheduler factories; each callable in `users` is called with the optimizer
    once it exists."""
    def get_optimizer_param_scheduler(optimizer: Any) -> StepScheduler:
        return StepScheduler(optimizer, lr_schedule(args), args.global_batch_size, args.weight_decay, step.running_step)

    def get_megatron_optimizer(config: Any, chunks: Any, **options: Any) -> Any:
        optimizer = build_optimizer(config, chunks, args.ema_decay, step.embedding_has_gradient, adamw=args.adamw,
                                    **options)
        for use in users:
            use(optimizer)
        return optimizer

    megatron_training.get_megatron_optimizer = get_megatron_optimizer
    megatron_training.get_optimizer_param_scheduler = get_optimizer_param_scheduler
