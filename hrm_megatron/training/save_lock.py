"""One run at a time in a --save folder: two would overwrite each other's checkpoints, tracker and records."""
from __future__ import annotations

import argparse
import logging
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

from hrm_megatron.checkpoint.manifest import TRACKER_FILE
from hrm_megatron.config import ConfigError
from hrm_megatron.data.folder_lock import InUse, open_and_lock
from hrm_megatron.training.error_file import RestartableError

log = logging.getLogger(__name__)

LOCK_FILE = ".lock"
LEASE_SECONDS = 150  # until a dead machine's locks are released: NFSv4 90 s, Lustre some 100 s
WAIT_SECONDS = 5


class SaveLock:
    """Rank 0's lock on `--save`. It ends with the process, and child processes do not keep it."""

    def __init__(self, wait: Callable[[float], None] = time.sleep) -> None:
        self._file: int | None = None
        self._settled = False
        self._wait = wait

    def __enter__(self) -> SaveLock:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def hold(self, args: argparse.Namespace, make: bool = False) -> None:
        """Lock the folder if this run saves and the folder exists, or create it if `make`.

        Raises ConfigError if another run holds the lock or the folder cannot be written.
        """
        if self._settled or not args.save or args.skip_train or args.rank:
            return
        folder = Path(args.save)
        try:
            if make:
                folder.mkdir(parents=True, exist_ok=True)
            elif not folder.is_dir():
                return
            before = _tracked(folder)
            self._file = self._lock_of(folder)
            # The other ranks did not wait, and may have read the previous state.
            if _tracked(folder) != before and args.world_size > 1:
                raise RestartableError(f"--save {folder}: the run that had it has saved another step while this one "
                                       "waited; start it again")
        except OSError as error:
            raise ConfigError(f"--save {folder}: cannot write to {folder} ({error.strerror}); choose another folder"
                              ) from error
        self._settled = True
        os.register_at_fork(after_in_child=self._close)  # a worker may outlive this process by seconds

    def _lock_of(self, folder: Path) -> int | None:
        waited = 0
        while True:
            try:
                return open_and_lock(folder / LOCK_FILE, f"--save {folder}", "choose another folder")
            except InUse as error:
                if f" on {platform.node()} " in error.holder or waited >= LEASE_SECONDS:
                    raise
                if not waited:
                    log.info(f"checkpoint: {error}; or its machine has died, so this run waits up to {LEASE_SECONDS} s")
            self._wait(WAIT_SECONDS)
            waited += WAIT_SECONDS

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


def _tracked(folder: Path) -> bytes | None:
    """Return the content of the folder's tracker file, damaged or not, or None."""
    place = folder / TRACKER_FILE
    return place.read_bytes() if place.is_file() else None
