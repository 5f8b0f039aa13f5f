"""Small files of a run beside its checkpoints, and the error of a run that cannot write into `--save`."""
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
LASTING = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)  # a restart would fail again


def unwritten(save: str, what: str, error: OSError | CheckpointException, again: str = "") -> ConfigError:
    """Return the error that `what` cannot be written into `save`; a launcher restarts after it unless it is permanent.

    `again` is appended to "start again".
    """
    reason = _reason(error, Path(save))
    lasts = reason == NO_SPACE or (isinstance(error, OSError) and error.errno in LASTING)
    kind = ConfigError if lasts else RestartableError
    return kind(f"--save {save}: cannot write {what} ({reason}); mend that and start again{again}")


def _reason(error: OSError | CheckpointException, save: Path) -> str:
    """Return why a save failed; Megatron's writer reports only the class of its exception."""
    if shutil.disk_usage(save).free < RESERVE_BYTES:
        return NO_SPACE
    if isinstance(error, CheckpointException):
        causes = [str(cause[0]) for cause in error.failures.values()]
        return f"see the lines above; {causes[0]}" if causes else "another rank could not"
    return error.strerror or str(error)


def on_rank_0[T](work: Callable[[], T]) -> T:
    """Run `work` on rank 0; return its result, or raise its ConfigError, on all ranks."""
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
    """Write a file into `save`; call it on one rank. Raises ConfigError if it cannot be written."""
    try:
        write_aside(Path(save) / name, content)
    except OSError as error:
        raise unwritten(save, name, error) from error


def read_record[T](path: Path, take: Callable[[Any], T], trouble: str, way_out: str) -> T | None:
    """Return `take(content)` of a JSON file of the run, or None if the file does not exist.

    Raises ConfigError with `trouble`, the reason and `way_out` if it cannot be read or lacks a value.
    """
    try:
        return take(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path}: {trouble} ({error}); {way_out}") from error
