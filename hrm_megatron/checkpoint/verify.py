"""Verify every byte of a checkpoint folder, alone or as one of several ranks that share the work."""
from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from megatron.core.dist_checkpointing.core import CheckpointingConfig

from hrm_megatron.checkpoint.archive import WAY_OUT, DamagedError, naming
from hrm_megatron.checkpoint.dcp import DCPFolder
from hrm_megatron.checkpoint.folders import DCP_CONFIG_FILE, last_saved_first
from hrm_megatron.checkpoint.iterations import is_iteration, iteration_of
from hrm_megatron.checkpoint.manifest import MANIFEST_FILE
from hrm_megatron.config import ConfigError

WITHOUT_MANIFEST = f"has no {MANIFEST_FILE}: its tensors were held against their CRC32s, other files only read"
UNVERIFIED = "was not verified (--no-verify-checkpoint)"
FORMAT = CheckpointingConfig("torch_dist")


def verify(folder: Path, rank: int = 0, ranks: int = 1) -> int:
    """Verify this rank's share of an iteration's folder; return the number of bytes whose contents were read.

    Each rank reads `.metadata`; every file is checked, and its contents read, once by the ranks together. Raises
    DamagedError at the first problem.
    """
    with naming(folder):
        stored = DCPFolder(folder)
        check_around_tensors(stored, rank, ranks)
        mine = share(stored.pieces(), rank, ranks)
        stored.check_pieces(mine)
    return sum(piece.length for piece in mine)


def check_around_tensors(stored: DCPFolder, rank: int = 0, ranks: int = 1) -> str:
    """Verify the cheap part of this rank's share: that all files exist with the right size, and everything that the
    manifest covers.

    Returns a remark if there is no manifest, else "".
    """
    _check_config(stored.path / DCP_CONFIG_FILE)
    stored.check_files(rank, ranks)
    if manifest := stored.manifest:
        if is_iteration(stored.path.name) and iteration_of(stored.path.name) != manifest.iteration:
            raise DamagedError(f"{stored.path / MANIFEST_FILE}: of iteration {manifest.iteration}; {WAY_OUT}")
        manifest.check_sizes(rank, ranks)
        for name in sorted(manifest.files)[rank::ranks]:
            manifest.check_file(name)
    return "" if manifest else WITHOUT_MANIFEST


class Stretch(Protocol):
    """A byte range that is read as a whole."""

    @property
    def length(self) -> int: ...


def share[T: Stretch](pieces: Sequence[T], rank: int, ranks: int) -> list[T]:
    """Return the pieces whose middle lies in this rank's share of all bytes: each rank reads one contiguous stretch."""
    total_bytes = sum(piece.length for piece in pieces)
    chosen: list[T] = []
    before = 0
    for piece in pieces:
        if (2 * before + piece.length) * ranks // (2 * total_bytes) == rank:
            chosen.append(piece)
        before += piece.length
    return chosen


@contextlib.contextmanager
def naming_another(folder: Path) -> Iterator[None]:
    """Add the newest iteration that verifies to an error about a damaged iteration."""
    try:
        yield
    except DamagedError as error:
        if not folder.exists():
            raise ConfigError(f"{folder}: was deleted or moved while it was read, by a run that saves there "
                              "(--save-retain-interval, --most-recent-k, --ckpt-step); start again") from error
        for name in last_saved_first(folder.parent):
            if name != folder.name and _is_whole(folder.parent / name):
                raise ConfigError(f"{error}; the newest that verifies: --ckpt-step {iteration_of(name)}") from error
        raise ConfigError(f"{error}; no other in {folder.parent} verifies") from error


def _is_whole(folder: Path) -> bool:
    try:
        verify(folder)
    except DamagedError:
        return False
    return True


def _check_config(place: Path) -> None:
    """Refuse a metadata.json that Megatron would not understand; Megatron-FSDP and HRM-Text write none."""
    if place.exists():
        with naming(place):
            known = {field.name for field in dataclasses.fields(FORMAT)}
            content = json.loads(place.read_text(encoding="utf-8"))
            found = CheckpointingConfig(**{name: value for name, value in content.items() if name in known})
            if found != FORMAT:
                raise ValueError(f"{found} is not {FORMAT}")
