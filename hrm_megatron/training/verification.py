"""On all ranks together: verify the checkpoint that a run loads, and write the manifest of one that it has saved."""
from __future__ import annotations

import argparse
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.validation import INTEGRITY_FNAME
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from hrm_megatron.checkpoint.folders import last_saved_first
from hrm_megatron.checkpoint.iterations import iteration_of
from hrm_megatron.checkpoint.manifest import (
    MANIFEST_FILE,
    TENSORS,
    FileRecord,
    describe,
    describe_folder,
    read_manifest,
    write_manifest,
)
from hrm_megatron.checkpoint.verify import UNVERIFIED, WITHOUT_MANIFEST, verify
from hrm_megatron.config import ConfigError, refuse_beside
from hrm_megatron.training.early_stopping import delete_older
from hrm_megatron.training.going_back import way_back
from hrm_megatron.transformer_config import architecture_of

log = logging.getLogger(__name__)


def check_verification_flags(args: argparse.Namespace) -> None:
    """Refuse verification flags that would have no effect."""
    if args.load_newest_valid:
        refuse_beside("--load-newest-valid", {"--no-verify-checkpoint": not args.verify_checkpoint})
    for flag, given in (("--load-newest-valid", args.load_newest_valid),
                        ("--no-verify-checkpoint", not args.verify_checkpoint)):
        if given and not (args.load or args.pretrained_checkpoint):
            raise ConfigError(f"{flag}: there is no checkpoint to load; give --load, or leave it out")


def verify_end(args: argparse.Namespace, folder: Path, check_fit: Callable[[Path], bool],
               back_to: int | None = None) -> bool:
    """Verify the last iteration of a finished run by `verify_start`, before a model or process groups exist.

    Returns whether something is left to do after all, because an older iteration replaces it.
    """
    if not args.verify_checkpoint:
        return False
    # A key prefix, because Megatron's process group will use the same store.
    store = PrefixStore("verify_end", next(rendezvous("env://", args.rank, args.world_size))[0])
    torch.distributed.init_process_group("gloo", store=store, rank=args.rank, world_size=args.world_size)
    try:
        return verify_start(args, folder, check_fit, back_to)
    finally:
        torch.distributed.destroy_process_group()


def check_integrity(args: argparse.Namespace, folder: Path) -> None:
    """Refuse --verify-integrity for an iteration that was saved without it."""
    if args.verify_integrity and not (folder / INTEGRITY_FNAME).exists():
        raise ConfigError(f"--verify-integrity: {folder} was saved without it; leave it out, for every checkpoint "
                          "is verified")


def verify_start(args: argparse.Namespace, folder: Path | None, check_fit: Callable[[Path], bool],
                 back_to: int | None = None) -> bool:
    """Verify the iteration that is about to be loaded, each rank a share; if it is damaged, raise ConfigError on all.

    With --load-newest-valid, the newest other valid iteration is loaded instead, if `check_fit` accepts it; not if the
    run rolls back to this one (`back_to`). Returns whether another iteration is loaded that leaves something to do.
    """
    if folder is None:
        return False
    if not args.verify_checkpoint:
        log.info(f"checkpoint: {folder} {UNVERIFIED}")
        return False
    has_manifest = (folder / MANIFEST_FILE).exists()  # read before the ranks synchronize: one may be written afterwards
    damage = _verify_together(folder)
    if damage is None:
        if args.save and not args.skip_train and folder.parent.resolve() == Path(args.save).resolve():
            _complete_save(args, folder, has_manifest)
        return False
    other = next((place.name for place in stand_ins(folder, back_to) if _verify_together(place) is None), None)
    if other is None:
        raise ConfigError(f"{damage}; no {'earlier' if back_to else 'other'} iteration in {folder.parent} verifies")
    if back_to:
        raise ConfigError(f"{damage}; the newest before it that verifies: {way_back(args, iteration_of(other))}")
    if not args.load_newest_valid:
        raise ConfigError(f"{damage}; the newest that verifies: {way_back(args, iteration_of(other))}, which "
                          "--load-newest-valid takes by itself")
    args.ckpt_step = iteration_of(other)
    log.info(f"checkpoint: {damage}; going on from {other}, the newest that verifies")
    return check_fit(folder.parent / other)


def stand_ins(folder: Path, before: int | None = None) -> Iterator[Path]:
    """Yield the iterations that may replace a damaged one, the last saved first; with `before`, only earlier ones."""
    # Megatron cannot be told to load iteration 0, the model before its first step.
    return (folder.parent / name for name in last_saved_first(folder.parent)
            if name != folder.name and 0 < iteration_of(name) < (before or math.inf))


def _complete_save(args: argparse.Namespace, folder: Path, has_manifest: bool) -> None:
    """Complete the save of this iteration if a kill interrupted it after its last file: manifest and deletions."""
    if not has_manifest:
        record_save(args, folder)
    if not torch.distributed.get_rank():
        delete_older(args, iteration_of(folder.name))


def _verify_together(folder: Path) -> str | None:
    """Return the damage of the folder, the same on all ranks, or None."""
    began, read_bytes, damage = time.perf_counter(), 0, None
    try:
        read_bytes = verify(folder, torch.distributed.get_rank(), torch.distributed.get_world_size())
    except ConfigError as error:
        damage = str(error)
    everyone = _gather((read_bytes, damage))
    first = next((theirs for _, theirs in everyone if theirs), None)
    if first is None:
        size = sum(theirs for theirs, _ in everyone)
        log.info(f"checkpoint: {folder} verified: {size / 1e9:.2f} GB in {time.perf_counter() - began:.1f} s"
             + ("" if read_manifest(folder) else f"; it {WITHOUT_MANIFEST}"))
    return first


def record_save(args: argparse.Namespace, folder: Path) -> None:
    """Write the manifest of the iteration that all ranks have just saved; each rank describes its own files."""
    rank = torch.distributed.get_rank()
    mine: dict[str, FileRecord] = {}
    fault = None
    try:
        mine = {path.name: describe(path) for path in folder.glob(f"__{rank}_*{TENSORS}")}
    except ConfigError as error:
        fault = str(error)
    everyone = _gather((mine, fault))
    fault = next((theirs for _, theirs in everyone if theirs), None)
    if rank == 0 and not fault:
        known = {name: record for theirs, _ in everyone for name, record in theirs.items()}
        try:
            write_manifest(folder, iteration_of(folder.name), asdict(architecture_of(args, args.vocab_size)),
                           describe_folder(folder, known=known))
        except (OSError, ConfigError) as error:
            fault = str(error)
    if fault:
        log.info(f"checkpoint: {folder}: saved, but without {MANIFEST_FILE} ({fault})")


def _gather[T](mine: T) -> list[T]:
    everyone: list[T] = [mine] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    return everyone
