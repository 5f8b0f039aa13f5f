"""Our curves beside those that Megatron writes to TensorBoard and W&B."""
from __future__ import annotations

import argparse
import logging
import threading
from collections.abc import Callable
from typing import Any

from megatron.training.global_vars import get_tensorboard_writer, get_wandb_writer

from hrm_megatron.parallel.patching import around

log = logging.getLogger(__name__)


def guard_curves(args: argparse.Namespace) -> None:
    """Let the run continue with a warning if curves cannot be written, as on a full disk."""
    if not (writer := get_tensorboard_writer()):
        return
    events = writer.file_writer.event_writer  # used by every method of the writer, also in Megatron's calls
    stopped = False

    def guarded(stock: Callable[..., None], *rest: Any) -> None:
        nonlocal stopped
        try:
            if not stopped:
                stock(*rest)
        except OSError as error:
            stopped = True
            log.warning(f"--tensorboard-dir {args.tensorboard_dir}: no more curves there ({error.strerror or error})")

    def without_traceback(stock: Callable[..., None], ended: threading.ExceptHookArgs) -> None:
        if not (ended.thread is events._async_writer._worker and isinstance(ended.exc_value, OSError)):
            stock(ended)
    for name in ("add_event", "flush", "close"):
        setattr(events, name, around(getattr(events, name), guarded))
    # The writer's thread ends with the error that these methods then raise; its traceback would run into our lines.
    threading.excepthook = around(threading.excepthook, without_traceback)


def writes(args: argparse.Namespace, step: int) -> bool:
    """Tell whether Megatron writes curves at this step, and therefore synchronizes anyway."""
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
    """Make written values visible to readers now; TensorBoard's writer does so only every two minutes."""
    if writer := get_tensorboard_writer():
        writer.flush()
