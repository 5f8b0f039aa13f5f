"""Locks for one run at a time in a folder, or for the tasks of one job array, released when the process ends."""
from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

from hrm_megatron.config import ConfigError

log = logging.getLogger(__name__)

WITHOUT_LOCKS = "%s: the file system has no locks (%s); see that no other run writes there"


class InUse(ConfigError):
    """Another run holds the lock; `holder` is what that run has written into the lock file about itself."""

    def __init__(self, what: str, holder: str, way_out: str) -> None:
        super().__init__(f"{what} is in use by another run{f' ({holder})' if holder else ''}; wait for its end, or "
                         f"{way_out}")
        self.holder = holder


@contextlib.contextmanager
def lock(path: Path, what: str, shared: bool = False) -> Iterator[bool]:
    """Hold the lock file at `path` for the block; raise InUse, naming `what`, if another process holds it.

    `shared` locks can be held at the same time. Yields False if the file system does not support locks.
    """
    file = open_and_lock(path, what, "choose another --output-prefix", shared)
    try:
        yield file is not None
    finally:
        if file is not None:
            os.close(file)  # releases the lock


def locked_in_place(file: int, path: Path, shared: bool = False) -> bool:
    """Lock an open file without waiting; return False if `path` is no longer this file, because its holder has removed
    or replaced it.

    Raises BlockingIOError if another process holds the lock, OSError if the file system does not support locks.
    """
    fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def open_and_lock(path: Path, what: str, way_out: str, shared: bool = False) -> int | None:
    """Create and lock the lock file; return its descriptor, which holds the lock until it is closed, or None if the
    file system does not support locks.

    Raises InUse if another process holds it.
    """
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if locked_in_place(file, path, shared):
                break
            os.close(file)
        except BlockingIOError as error:
            holder = os.pread(file, 1000, 0).decode("utf-8", "replace").strip()
            os.close(file)
            raise InUse(what, holder, way_out) from error
        except OSError as error:
            os.close(file)
            log.warning(WITHOUT_LOCKS, path.parent, error.strerror)
            return None
    if not shared:
        holder = f"process {os.getpid()} on {platform.node()} since {time.strftime('%Y-%m-%d %H:%M:%S')}"
        os.ftruncate(file, 0)
        os.pwrite(file, holder.encode(), 0)
    return file
