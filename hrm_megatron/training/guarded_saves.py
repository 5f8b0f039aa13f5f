"""Saves that never damage an older iteration and never look complete before they are."""
from __future__ import annotations

import argparse
import functools
import logging
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core.rerun_state_machine import RerunState, get_rerun_state_machine
from megatron.training import checkpointing
from megatron.training import training as megatron_training
from torch.distributed.checkpoint.api import CheckpointException

from hrm_megatron.checkpoint.folders import COMPLETE_FILES, complete_iterations, listed
from hrm_megatron.checkpoint.iterations import RELEASE, folder_name, iteration_of
from hrm_megatron.checkpoint.manifest import TENSORS, TRACKER_FILE
from hrm_megatron.checkpoint.retention import finish_deletion
from hrm_megatron.config import ConfigError
from hrm_megatron.parallel.patching import around, temporarily
from hrm_megatron.training.early_stopping import delete_older
from hrm_megatron.training.evaluation import EVALUATED
from hrm_megatron.training.restarts import end_helpers_with_their_rank
from hrm_megatron.training.run_files import unwritten
from hrm_megatron.training.verification import record_save

log = logging.getLogger(__name__)


def guard_saves(args: argparse.Namespace, start: Path | None) -> None:
    """Wrap Megatron's save and load functions so that a partially written iteration never looks complete, and so that
    --no-save-optim and --no-save-rng do not affect loading (stock code does not load what it is told not to save).
    Loading takes the iteration `start`, whatever the tracker file beside it says.

    An asynchronous save reports its error when it is finalized. An iteration is saved only once: a second save, as
    after Megatron's loop, would start by invalidating the first.
    """
    end_helpers_with_their_rank(args.async_save)
    stock: Callable[..., None] = megatron_training.save_checkpoint
    stock_schedule: Callable[[Any], None] = checkpointing.schedule_async_save
    stock_end: Callable[..., None] = megatron_training.maybe_finalize_async_save
    begun: list[int] = []
    retain_interval = args.save_retain_interval

    def record(folder: Path) -> None:
        record_save(args, folder)
        if not torch.distributed.get_rank():
            with temporarily(args, save_retain_interval=retain_interval):  # for our own deletion
                delete_older(args, iteration_of(folder.name))

    def without_megatrons_deletion() -> AbstractContextManager[None]:  # it deletes before the new manifest is written
        return temporarily(args, save_retain_interval=None)

    def schedule(folder: Path, request: Any) -> None:
        scheduled = time.monotonic()

        def finish() -> None:
            record(folder)
            log.info(f"checkpoint: {folder}: whole {time.monotonic() - scheduled:.1f} s after it was handed over")
        request.add_finalize_fn(finish)  # runs after all of Megatron's
        stock_schedule(request)

    def refuse(iteration: int, error: OSError | CheckpointException) -> ConfigError:
        refusal = unwritten(args.save, f"iteration {iteration}", error,
                            f" with --load {args.save}{listed(Path(args.save))}")
        shutil.rmtree(Path(args.save) / folder_name(iteration), ignore_errors=True)  # free its space
        return refusal

    @functools.wraps(stock)
    def save_checkpoint(iteration: int, *rest: Any, **options: Any) -> None:
        folder = Path(args.save) / folder_name(iteration)
        if not torch.distributed.get_rank():
            finish_deletion(Path(args.save))  # frees space that may be needed
            for name in COMPLETE_FILES:  # an older save of this iteration is about to be overwritten
                (folder / name).unlink(missing_ok=True)
            (Path(args.save) / EVALUATED).unlink(missing_ok=True)  # it belongs to other weights
            for path in folder.glob(f"*{TENSORS}"):  # the old save may have had other ranks
                path.unlink()
        torch.distributed.barrier()
        begun.append(iteration)
        try:
            with without_megatrons_deletion(), temporarily(checkpointing,
                                                           schedule_async_save=functools.partial(schedule, folder)):
                stock(iteration, *rest, **options)
            if not args.async_save:
                record(folder)
        except (OSError, CheckpointException) as error:
            raise refuse(iteration, error) from error

    @functools.wraps(stock_end)
    def maybe_finalize_async_save(*rest: Any, **options: Any) -> None:
        try:
            with without_megatrons_deletion():
                stock_end(*rest, **options)
        except (OSError, CheckpointException) as error:  # from the oldest unfinished save
            whole = set(complete_iterations(Path(args.save)))
            raise refuse(next((i for i in begun if folder_name(i) not in whole), begun[-1]), error) from error

    def load_checkpoint(stock: Callable[..., tuple[int, int]], *rest: Any, **options: Any) -> tuple[int, int]:
        with temporarily(args, no_save_optim=None, no_save_rng=None), _tracked(start):
            return stock(*rest, **options)

    def save_once(stock: Callable[..., None], iteration: int, *rest: Any, **options: Any) -> None:
        saved = iteration in (args.iteration, *begun[-1:])  # args.iteration: the one that was loaded
        # Megatron's rerun state machine saves its findings about a step, so that the next start reruns it.
        if not saved or get_rerun_state_machine().state == RerunState.WILL_RERUN_FROM_CHECKPOINT:
            stock(iteration, *rest, **options)

    megatron_training.save_checkpoint_and_time = around(megatron_training.save_checkpoint_and_time, save_once)
    megatron_training.load_checkpoint = around(megatron_training.load_checkpoint, load_checkpoint)
    megatron_training.save_checkpoint = save_checkpoint
    megatron_training.maybe_finalize_async_save = maybe_finalize_async_save


@contextmanager
def _tracked(start: Path | None) -> Iterator[None]:
    """Let Megatron find a tracker file that names `start`, where its own may be missing, damaged or that of another
    run: it reads one even with --ckpt-step, and ends the process over one that it cannot read."""
    if start is None:
        yield
        return
    stock: Callable[[str], str] = checkpointing.get_checkpoint_tracker_filename
    with tempfile.TemporaryDirectory() as folder:
        tracker = Path(folder) / TRACKER_FILE
        tracker.write_text(RELEASE if start.name == RELEASE else str(iteration_of(start.name)))
        with temporarily(checkpointing, get_checkpoint_tracker_filename=lambda load: (
                str(tracker) if load is not None and Path(load) == start.parent else stock(load))):
            yield
