"""Disk space of checkpoints: how many exist at once, and whether they fit."""
from __future__ import annotations

import argparse
import logging
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from hrm_megatron.checkpoint.folders import complete_iterations
from hrm_megatron.checkpoint.iterations import iteration_of
from hrm_megatron.checkpoint.retention import bytes_of_deleted
from hrm_megatron.config import Architecture, ConfigError
from hrm_megatron.program import followed, nearest
from hrm_megatron.training.lora import saved_bytes

log = logging.getLogger(__name__)


def coming_saves(args: argparse.Namespace, done: int) -> list[int]:
    """List the iterations that a run saves after step `done`: at every interval, and at the end."""
    if done >= args.train_iters:
        return []
    every = args.save_interval or args.train_iters
    return [*range((done // every + 1) * every, args.train_iters, every), args.train_iters]


def kept_saves(args: argparse.Namespace) -> int | None:
    """Return how many of its last checkpoints a run keeps; None: all."""
    return args.most_recent_k or (1 if args.save_retain_interval else None)


def most_at_once(args: argparse.Namespace, saves: Sequence[int]) -> int:
    """Return the maximum number of checkpoints that exist at once if a run saves these iterations in this order: those
    that it keeps, the one being written, and those that flags protect."""
    if (kept := kept_saves(args)) is None:
        return len(saves)
    older, last = saves[:-kept - 1], saves[-kept - 1:]
    protected = [step for step in older if not step or (args.save_retain_interval
                                                        and step % args.save_retain_interval == 0)]
    best = bool(args.early_stopping and len(protected) < len(older))
    return len(protected) + best + len(last)


def check_writable(args: argparse.Namespace) -> None:
    """Refuse a `--save` that cannot be written or created, without writing anything.

    A dry run, perhaps on a machine without the disks of the run, only reports a folder that is not writable.
    """
    place = _place(args)
    if place.is_dir() and os.access(place, os.W_OK):
        return
    if not (args.dry_run and place.is_dir()):
        raise ConfigError(f"--save {args.save}: cannot write to {place}; choose another folder")
    log.info(f"checkpoint: --save {args.save}: {place} is not writable here; the run needs a folder that is")


def check_space(args: argparse.Namespace, architecture: Architecture, done: int) -> None:
    """Refuse a `--save` without space for the next checkpoint; if only the last ones are kept, for as many as exist at
    once, minus those already there."""
    count = min(1, len(coming := coming_saves(args, done)))
    what = "one checkpoint needs"
    if kept := kept_saves(args):
        count = min(len(coming), max(count, kept + 1 - len(_there(args, done))))
        if count > 1:
            what = f"{count} checkpoints (the last {kept} are kept, and one more is written) need"
    needed = count * saved_bytes(args, architecture)
    if (free := _free_bytes(args)) < needed:
        raise ConfigError(f"--save {args.save}: {what} {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free; free some "
                          "space or choose another disk")


def describe_space(args: argparse.Namespace, architecture: Architecture, done: int) -> str:
    """Describe the space that the checkpoints after step `done` need."""
    size = saved_bytes(args, architecture)
    line = f"checkpoint: {size / 1e9:.2f} GB each"
    if not args.save:
        return f"{line}; nothing is saved (--save DIR)"
    coming = coming_saves(args, done)
    there = _there(args, done)
    count = min(len(coming), max(1, most_at_once(args, sorted({*there, *coming})) - len(there)))
    at_once = f", of which {count} {'is' if count == 1 else 'are'} there at once," if count < len(coming) else ""
    free = _free_bytes(args)
    return (f"{line}, {len(coming)} saves{at_once} take {count * size / 1e9:,.2f} GB; {_place(args)} has "
            f"{free / 1e9:,.2f} GB free{'' if free >= count * size else ': NOT ENOUGH for all of them'}")


def _there(args: argparse.Namespace, done: int) -> list[int]:
    """List the iterations in `--save` up to step `done`; later ones are never deleted."""
    there = (iteration_of(name) for name in complete_iterations(Path(args.save)))
    return [iteration for iteration in there if iteration <= done]


def _place(args: argparse.Namespace) -> Path:
    """Return `--save`, or the nearest place above it that exists."""
    return nearest(followed(Path(args.save)))


def _free_bytes(args: argparse.Namespace) -> int:
    """Return the bytes available for checkpoints in `--save`, including those of iterations whose deletion has
    begun."""
    return shutil.disk_usage(_place(args)).free + bytes_of_deleted(Path(args.save))
