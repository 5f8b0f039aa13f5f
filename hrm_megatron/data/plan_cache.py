"""Planned epochs on disk: planned by one process, memory-mapped by all that see the folder."""
from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import platform
import re
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from hrm_megatron.config import ConfigError
from hrm_megatron.data.folder_lock import locked_in_place
from hrm_megatron.data.npy_file import load_array
from hrm_megatron.program import listening, nearest, signals_held

OFFSETS, EXAMPLE_IDS, COUNTS = "offsets.npy", "example_ids.bin", "plan.json"  # files of a planned epoch
POLL_SECONDS, LONGEST_POLL_SECONDS = 0.2, 5.0  # between polls for another process's plan: first, longest
PATIENCE_SECONDS = 300.0  # after this, a process plans itself what it has left to another process of its node
STALE_SECONDS = 86_400.0  # no plan takes that long
VANISHED = (errno.ENOENT, errno.ESTALE)
LOCKS_UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)

Ints = np.ndarray  # [n] integers
Windows = Iterable[tuple[Ints, Ints, int]]  # ids row by row, number of ids of each row, positions filled
Plan = Callable[[], Windows]

log = logging.getLogger(__name__)


def writable_folder(*wanted: Path) -> Path:
    """Return the first of these folders that can be written, else a folder of this user in the temporary directory.

    Nothing is created. If it is not the first folder, a log line names it.
    """
    own = Path(tempfile.gettempdir()) / f"hrm_megatron-{os.getuid()}" / "rows"
    for number, folder in enumerate([*wanted, own]):
        around = nearest(folder.absolute())
        if around.is_dir() and os.access(around, os.W_OK | os.X_OK):
            if number:
                log.info("data: %s cannot be written: planned rows are kept in %s (another: --data-cache-path)",
                         wanted[0], folder)
            return folder
    raise ConfigError(f"{wanted[0]}: cannot keep planned rows there, nor in {own}; give --data-cache-path")


@dataclass(frozen=True)
class Rows:
    """Row i holds `example_ids[offsets[i]:offsets[i + 1]]`, in order; all rows fill `tokens` positions."""

    offsets: Ints
    example_ids: Ints
    tokens: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> Ints:
        return self.example_ids[self.offsets[row]:self.offsets[row + 1]]

    @classmethod
    def gathered(cls, windows: Windows) -> Rows:
        """Concatenate windows in memory."""
        ids, sizes, tokens = zip(*windows, strict=True)
        return cls(_offsets(sizes), np.concatenate(ids), sum(tokens))


def _offsets(sizes: Iterable[Ints]) -> Ints:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(np.concatenate([*sizes]), dtype=np.int64)])


class PlanCache:
    """A folder of planned epochs, by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def opened(self, name: str, plan: Plan) -> Rows:
        """Open a planned epoch. If it is not planned yet, one process plans it, however long that takes; the others
        wait.

        Of the processes that a launcher has started on a node only one tries to plan; the others only poll for the
        folder, which spares the storage their locks.
        """
        folder, began, pause = self.folder / name, time.monotonic(), POLL_SECONDS
        while not folder.exists():
            if _plans_for_its_node() or time.monotonic() - began > PATIENCE_SECONDS:
                self._plan_alone(folder, plan)
                if folder.exists():
                    break
            if pause == POLL_SECONDS:
                log.info("data: waiting for the process that plans rows into %s", folder)
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_POLL_SECONDS)
        return _load(folder)

    def plan_ahead(self, name: str, plan: Plan) -> None:
        """Plan an epoch in a thread, unless it is planned or another process is planning it."""
        if _plans_for_its_node() and not (self.folder / name).exists():
            threading.Thread(target=self._plan_quietly, args=(name, plan), daemon=True, name="plan").start()

    def num_rows(self, name: str) -> int | None:
        """Return the number of rows of a planned epoch; None if it is not planned."""
        return len(_load(self.folder / name)) if (self.folder / name).exists() else None

    def _plan_quietly(self, name: str, plan: Plan) -> None:
        try:
            self._plan_alone(self.folder / name, plan)
        except ConfigError as error:
            log.warning("data: the next epoch is planned when it begins: %s", error)

    def _plan_alone(self, folder: Path, plan: Plan) -> None:
        """Plan an epoch unless another process is planning it or has done so."""
        with self._lock(folder.name) as mine:
            if mine and not folder.exists():
                self._write(folder, plan())

    @contextlib.contextmanager
    def _lock(self, name: str) -> Iterator[bool]:
        """Hold the lock of a plan; yield False if another process or thread has it. It ends with its process."""
        path = self.folder / f"{name}.lock"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        try:
            lock = _locked(file, path)
            if lock is Lock.OURS:
                # Locks may be local to a node: a process of another node may be writing, too.
                for partial in filter(_was_left, self.folder.glob(f"{name}.partial-*")):
                    shutil.rmtree(partial, ignore_errors=True)
            try:
                yield lock is not Lock.TAKEN
            finally:
                if lock is not Lock.TAKEN:
                    path.unlink(missing_ok=True)
        finally:
            os.close(file)

    @listening()
    def _write(self, folder: Path, windows: Windows) -> None:
        """Write a planned epoch that other processes see completely or not at all; write nothing if another process has
        removed the unfinished folder."""
        partial = folder.with_name(f"{folder.name}.partial-{platform.node()}-{os.getpid()}-{uuid.uuid4().hex}")
        try:
            partial.mkdir()
            _write_rows(partial, windows)
            partial.rename(folder)
        except OSError as error:
            vanished = error.errno in VANISHED and not partial.exists()
            if not (vanished or folder.exists()):  # else another process was faster, with the same rows
                raise _unwritable(folder, error) from error
        finally:
            with signals_held():
                shutil.rmtree(partial, ignore_errors=True)


class Lock(Enum):
    """Result of an attempt to lock. NONE: the file system does not support locks, so every node plans for itself and
    the first rename wins."""

    OURS = auto()
    TAKEN = auto()
    NONE = auto()


def _locked(file: int, path: Path) -> Lock:
    """Lock an open file; it counts as TAKEN, too, if it is no longer the file at that path."""
    try:
        return Lock.OURS if locked_in_place(file, path) else Lock.TAKEN
    except BlockingIOError:
        return Lock.TAKEN
    except OSError as error:
        if error.errno not in LOCKS_UNSUPPORTED:
            raise
        return Lock.NONE


def _plans_for_its_node() -> bool:
    """Return whether this process plans for its node: local rank 0, or not started by a launcher."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _was_left(partial: Path) -> bool:
    """Return whether the writer of this folder is gone: it ran on this host, or the folder is STALE_SECONDS old."""
    writer = re.fullmatch(r".+\.partial-(.+)-(\d+)-[0-9a-f]+", partial.name)
    if writer and writer[1] == platform.node() and not psutil.pid_exists(int(writer[2])):
        return True
    with contextlib.suppress(OSError):  # removed meanwhile
        return time.time() - partial.stat().st_mtime > STALE_SECONDS
    return False


def _unwritable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"{folder}: cannot keep the packing plan ({error.strerror}); choose another --data-cache-path")


def _write_rows(folder: Path, windows: Windows) -> None:
    """Write ids as they arrive, without holding them in memory."""
    sizes, tokens, count = [], 0, 0
    with open(folder / EXAMPLE_IDS, "wb") as file:
        for ids, window_sizes, window_tokens in windows:
            ids.tofile(file)
            sizes.append(window_sizes)
            tokens += window_tokens
            count += len(ids)
    np.save(folder / OFFSETS, _offsets(sizes), allow_pickle=False)
    counts = {"rows": sum(map(len, sizes)), "examples": count, "tokens": tokens, "dtype": ids.dtype.name}
    (folder / COUNTS).write_text(json.dumps(counts), encoding="utf-8")


def _load(folder: Path) -> Rows:
    try:
        counts = _counts(folder / COUNTS)
        ids = np.memmap(folder / EXAMPLE_IDS, counts["dtype"], "r", shape=(counts["examples"],))
        offsets = load_array(folder / OFFSETS)
        if offsets.shape != (counts["rows"] + 1,) or offsets[-1] != len(ids):
            raise ValueError(f"{OFFSETS} and {COUNTS} do not agree")
        return Rows(offsets, ids, int(counts["tokens"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder}: damaged packing plan ({error}); delete that folder") from error


def _counts(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))
