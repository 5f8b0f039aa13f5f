"""Which checkpoint a run resumes from, what the two must agree on, and saves that never damage an older iteration."""
from __future__ import annotations

import argparse
import functools
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.training import training as megatron_training
from torch.distributed.checkpoint.api import CheckpointException

from hrm_megatron.checkpoint.folders import (
    COMPLETE_FILES,
    TRACKER_FILE,
    complete_iterations,
    find_iteration,
    listed,
    read_run,
    write_aside,
)
from hrm_megatron.checkpoint.fsdp_folder import is_megatron_fsdp, open_run
from hrm_megatron.config import Architecture, ConfigError
from hrm_megatron.optim.adam_atan2 import STATE_KEYS
from hrm_megatron.transformer_config import architecture_of

log = logging.getLogger(__name__)

RESERVE_BYTES = 1 << 20
# What decides the function that the weights stand for; how they were drawn does not matter any more.
MUST_AGREE = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "padded_vocab_size", "h_cycles",
              "l_cycles", "norm_placement", "rope_theta", "norm_epsilon")


def starting_point(args: argparse.Namespace) -> Path | None:
    """Return the iteration that the run goes on from; None for a run that begins.

    A run that was killed while it saved goes on from the latest complete iteration: the tracker file is put right.
    """
    for flag, load in (("--load", args.load), ("--pretrained-checkpoint", args.pretrained_checkpoint)):
        if load is None:
            continue
        if args.ckpt_step:
            return find_iteration(load, args.ckpt_step)
        tracker, complete = Path(load) / TRACKER_FILE, complete_iterations(Path(load))
        if tracker.exists() or complete:
            try:
                return find_iteration(load)
            except ConfigError as error:
                if not complete:
                    raise
                log.info(f"checkpoint: {error}; going on from {complete[-1]}, the latest that is complete")
                write_aside(tracker, str(int(complete[-1].removeprefix("iter_"))))
                return find_iteration(load)
        begins_here = flag == "--load" and (args.pretrained_checkpoint or load == args.save)
        if not begins_here or args.exit_on_missing_checkpoint:
            raise ConfigError(f"{flag} {load}: no checkpoint there; correct the path, or leave the flag out to begin "
                              "with new weights")
    return None


def check_checkpoint(args: argparse.Namespace) -> None:
    """Refuse to train where nothing could be saved, and to go on from a checkpoint that does not fit the run."""
    ours = architecture_of(args, args.vocab_size)
    if args.save:
        if args.save != args.load and (found := complete_iterations(Path(args.save))):
            raise ConfigError(f"--save {args.save}: holds {found[-1]} of another run; give --load {args.save} to go "
                              "on with that, or another --save")
        _check_space(args, ours)
    folder = starting_point(args)
    if folder is None:
        return
    stored = open_run(folder)
    stored.check_files()
    if is_megatron_fsdp(stored) != args.use_megatron_fsdp:
        with_or_without = "without" if args.use_megatron_fsdp else "with"
        raise ConfigError(f"{folder}: saved {with_or_without} --use-megatron-fsdp, whose checkpoints have a format of "
                          f"their own; train {with_or_without} it"
                          + ("" if args.use_megatron_fsdp else ", or pass the folder through tools/"
                             "convert_checkpoint.py --load-format megatron --save-format megatron"))
    _, theirs = read_run(stored)
    for name in MUST_AGREE:
        if getattr(theirs, name) != getattr(ours, name):
            raise ConfigError(f"{folder}: its model has {name}={getattr(theirs, name)}, the command line makes "
                              f"{getattr(ours, name)}; train with its sizes, or give another --load")
    if args.no_load_optim or args.finetune:
        return
    keys = set(stored.keys())
    for name in STATE_KEYS:
        missing = [key for key in stored.shapes() if key.endswith(".weight") and not key.startswith("optimizer.")
                   and f"optimizer.state.{name}.{key}" not in keys]
        if missing:
            raise ConfigError(f"{folder}: holds no {name} of the optimizer for {missing[0]}; give --no-load-optim to "
                              "go on with a new optimizer and an EMA that starts at its weights, or another --load")


def guard_saves(args: argparse.Namespace) -> None:
    """Let Megatron's loop save through a function that keeps a half-written iteration from looking whole."""
    stock: Callable[..., None] = megatron_training.save_checkpoint

    @functools.wraps(stock)
    def save_checkpoint(iteration: int, *rest: Any, **options: Any) -> None:
        folder = Path(args.save) / f"iter_{iteration:07d}"
        if not torch.distributed.get_rank():
            for name in COMPLETE_FILES:  # an older save of the same iteration is about to be written over
                (folder / name).unlink(missing_ok=True)
        torch.distributed.barrier()
        try:
            stock(iteration, *rest, **options)
        except (OSError, CheckpointException) as error:
            reason = _reason(error, Path(args.save))
            shutil.rmtree(folder, ignore_errors=True)  # give its space back
            raise ConfigError(f"--save {args.save}: cannot write iteration {iteration} ({reason}); mend that and start "
                              f"again with --load {args.save}{listed(Path(args.save))}") from error

    megatron_training.save_checkpoint = save_checkpoint


def _reason(error: Exception | CheckpointException, save: Path) -> str:
    """Say why a save failed; Megatron's writer hands on no more than the class of what happened to it."""
    if shutil.disk_usage(save).free < RESERVE_BYTES:
        return "no space left on the disk"
    if isinstance(error, CheckpointException):
        causes = [str(cause[0]) for cause in error.failures.values()]
        return f"see the lines above; {causes[0]}" if causes else "another rank could not"
    return getattr(error, "strerror", None) or str(error)


def _check_space(args: argparse.Namespace, architecture: Architecture) -> None:
    place = Path(args.save).resolve()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ConfigError(f"--save {args.save}: cannot write to {place}; choose another folder")
    state_bytes = 0 if args.no_save_optim else 4 * (1 + len(STATE_KEYS))  # fp32 masters and the state beside them
    needed = architecture.num_parameters * (args.params_dtype.itemsize + state_bytes)
    if (free := shutil.disk_usage(place).free) < needed:
        raise ConfigError(f"--save {args.save}: one checkpoint needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are "
                          "free; free some space or choose another disk")
