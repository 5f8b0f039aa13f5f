"""Curves of ours beside those that Megatron writes to TensorBoard and W&B."""
from __future__ import annotations

import argparse

from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer


def writes(args: argparse.Namespace, step: int) -> bool:
    """Whether Megatron writes curves at this step, for which the host waits anyway."""
    return step % int(args.tensorboard_log_interval) == 0


def write_scalars(values: dict[str, float], step: int) -> None:
    """Write values by name; only the last rank has a writer."""
    writer, wandb = get_tensorboard_writer(), get_wandb_writer()
    if not (writer and values):
        return
    for name, value in values.items():
        writer.add_scalar(name, value, step)
    if wandb:
        wandb.log(values, step)


def flush_scalars() -> None:
    """Let readers of the log see what is written; by itself that happens every two minutes."""
    if writer := get_tensorboard_writer():
        writer.flush()
