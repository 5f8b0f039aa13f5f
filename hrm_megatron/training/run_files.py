"""Small files of a run beside its checkpoints, and the line with which a run ends that cannot write into `--save`."""
from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from hrm_megatron.config import ConfigError
from hrm_megatron.program import write_aside
from hrm_megatron.training.error_file import RestartableError

RESERVE_BYTES = 1 << 20
NO_SPACE = "no space left on the disk"
LASTING = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)  # a start would fail as this one did


def unwritten(save: str, what: str, error: OSError | CheckpointException, again: str = "") -> ConfigError:
    """Say that `what` cannot be written into `save`, in an error that a launcher starts again behind unless it lasts.

    `again` follows "start again".
    """
    reason = _reason(error, Path(save))
    lasts = reason == NO_SPACE or (isinstance(error, OSError) and error.errno in LASTING)
    kind = ConfigError if lasts else RestartableError
    return kind(f"--save {save}: cannot write {what} ({reason}); mend that and start again{again}")


def _reason(error: OSError | CheckpointException, save: Path) -> str:
    """Say why a save failed; Megatron's writer hands on no more than the class of what happened to it."""
    if shutil.disk_usage(save).free < RESERVE_BYTES:
        return NO_SPACE
    if isinstance(error, CheckpointException):
        causes = [str(cause[0]) for cause in error.failures.values()]
        return f"see the lines above; {causes[0]}" if causes else "another rank could not"
    return error.strerror or str(error)


def on_rank_0[T](work: Callable[[], T]) -> T:
    """Do `work` on rank 0 and return what it returns on all ranks, which also raise its ConfigError alike."""
    told: list[T | ConfigError | None] = [None]
    if not torch.distributed.get_rank():
        try:
            told = [work()]
        except ConfigError as error:
            told = [error]
    torch.distributed.broadcast_object_list(told)
    [found] = told
    if isinstance(found, ConfigError):
        raise found
    return found  # type: ignore[return-value]


def write_file(save: str, name: str, content: str) -> None:
    """Write a file of the run from one rank."""
    try:
        write_aside(Path(save) / name, content)
    except OSError as error:
        raise unwritten(save, name, error) from error


def read_record[T](path: Path, take: Callable[[Any], T], trouble: str, way_out: str) -> T | None:
    """Return `take(content)` of a JSON file of the run, None if there is no such file.

    Raises ConfigError with `trouble`, the reason and `way_out` where it cannot be read or lacks a value.
    """
    try:
        return take(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path}: {trouble} ({error}); {way_out}") from error
