"""Why a rank ended: one line for the terminal and for torchrun, which repeats it as "Root Cause" in its last lines."""
from __future__ import annotations

import json
import os
import re
import time
import traceback
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler

from hrm_megatron.config import ConfigError
from hrm_megatron.training.memory import LESS_MEMORY

DEAD_WORKER = re.compile(r"DataLoader worker \(pid(\(s\))? [\d, ]+\)")  # torch's message, with the process id


class RestartableError(ConfigError):
    """An error after which the same command can resume, so a launcher may restart it; other ConfigErrors refuse the
    command."""

    outcome = "failed"


class WentBackError(RestartableError):
    """Ends a run that rolls back: the next start resumes from an earlier step and skips rows."""

    outcome = "went back"


def one_line(error: BaseException, rank: int) -> str | None:
    """Return one line that fully describes the error, or None for an error that needs its traceback."""
    if isinstance(error, ConfigError):
        return f"error: {error}"
    if isinstance(error, torch.OutOfMemoryError):
        return f"error: rank {rank}: {str(error).splitlines()[0]} {LESS_MEMORY}"
    what = str(error).partition("\n")[0].strip()
    if (isinstance(error, RuntimeError) and DEAD_WORKER.match(what)) or (
            isinstance(error, (ConnectionError, EOFError)) and _reads_from_workers(error)):
        return (f"error: rank {rank}: {what or type(error).__name__}; a process that reads data was killed, often for "
                "want of main memory: start the same command again, with fewer --num-workers if it comes back")
    return None


def _reads_from_workers(error: BaseException) -> bool:
    """Tell whether the error was raised where torch receives tensors from a data loader worker."""
    return any(Path(frame.f_code.co_filename).match("torch/utils/data/*.py")
               for frame, _ in traceback.walk_tb(error.__traceback__))


def outcome(error: BaseException) -> str:
    """Return the kind of an error for the launcher, as defined in cluster/failures.py."""
    return getattr(error, "outcome", "refused" if isinstance(error, ConfigError) else RestartableError.outcome)


class OneLineErrors(ErrorHandler):
    """Writes torchrun's error file: one line if that is enough, else the traceback."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def record_exception(self, e: BaseException) -> None:
        line, file = one_line(e, self.rank), os.environ.get("TORCHELASTIC_ERROR_FILE")
        if line is None or not file:
            super().record_exception(e)
            return
        # torchrun prints py_callstack if present, else the message (ChildFailedError._format_failure).
        extra = dict(py_callstack=line, timestamp=str(int(time.time())), outcome=outcome(e))
        with open(file, "w", encoding="utf-8") as stream:
            json.dump(dict(message=dict(message=line, extraInfo=extra)), stream)
