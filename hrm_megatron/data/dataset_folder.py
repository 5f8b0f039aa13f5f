"""The files of a dataset during writing: finished shards always stay, all else is removed with its run."""
from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hrm_megatron.config import ConfigError
from hrm_megatron.data.folder_lock import InUse, lock
from hrm_megatron.data.manifest import Source, check_seal, read_json, shard_folder, write_sealed
from hrm_megatron.data.shards import NAME_DIGITS, PARTS
from hrm_megatron.program import signals_held

LOCK = ".lock"
SCRATCH = "partial-"
RECORD = "source-"
OURS = re.compile(rf"([0-9a-f]{{{NAME_DIGITS}}})\.({'|'.join(PARTS)})|{RECORD}[0-9a-f]{{{NAME_DIGITS}}}\.json")


@dataclass(frozen=True)
class Task:
    """One task of a job array that shares out the sources; without an array, the only one."""

    number: int = 0
    count: int = 1

    @classmethod
    def of(cls, spelled: str) -> Task:
        """Parse the value of --shard."""
        found = re.fullmatch(r"(\d+)/(\d+)", spelled)
        task = cls(int(found[1]), int(found[2])) if found else None
        if task is None or task.number >= task.count:
            raise ConfigError(f"--shard {spelled}: give a task and their number, 0/4 to 3/4 for four of them")
        return task


class DatasetFolder:
    """PREFIX.json and PREFIX.shards, locked by this run alone or shared by the tasks of a job array.

    A finished source has a record in the folder until the manifest lists it.
    """

    def __init__(self, prefix: str | Path, task: Task | None = None) -> None:
        self.prefix = str(prefix)
        self.task = task
        self.shards = shard_folder(prefix)
        work = task or Task()
        self.scratch = self.shards / f"{SCRATCH}{work.number}-of-{work.count}"

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Create the folder and hold its lock; remove half-written files of dead runs. After an error, folders that are
        still empty are removed again."""
        made = [path for path in (self.shards, *self.shards.parents) if not path.exists()]
        with contextlib.ExitStack() as locks:
            with self.writing():
                self.shards.mkdir(parents=True, exist_ok=True)
                has_locks = locks.enter_context(lock(self.shards / LOCK, self.prefix, shared=self.task is not None))
                if self.task:
                    locks.enter_context(lock(self.shards / f"{LOCK}-{self.scratch.name}",
                                             f"{self.prefix}, --shard {self.task.number}/{self.task.count},"))
            try:
                with self.writing():
                    self._make_scratch(alone=has_locks and self.task is None)
                yield
            finally:
                with signals_held():
                    shutil.rmtree(self.scratch, ignore_errors=True)
                    if self.task is None:
                        self._remove_if_empty(made)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Turn an OSError, such as a full disk or a missing permission, into a one-line ConfigError."""
        try:
            yield
        except OSError as error:
            raise ConfigError(f"{self.prefix}: cannot write ({error.strerror}); free some space or choose another "
                              "--output-prefix") from error

    @contextlib.contextmanager
    def held_by_last(self) -> Iterator[bool]:
        """Hold the folder alone if no other task is working in it; yield whether that succeeded."""
        with contextlib.ExitStack() as locks:
            try:
                alone = locks.enter_context(lock(self.shards / LOCK, self.prefix))
            except InUse:
                alone = False
            try:
                if alone:
                    with self.writing():
                        self._make_scratch(alone)
                yield alone
            finally:
                if alone:
                    with signals_held():
                        shutil.rmtree(self.scratch, ignore_errors=True)

    def _make_scratch(self, alone: bool) -> None:
        for dead in self.shards.glob(f"{SCRATCH}*") if alone else [self.scratch]:
            shutil.rmtree(dead, ignore_errors=True)
        self.scratch.mkdir()

    def record(self, source: Source, settings: Mapping[str, Any], overwrite: bool) -> None:
        """Record that a source is finished, so that a resumed run finds its shard."""
        write_sealed(self._record_path(source.name), {"settings": dict(settings), "source": asdict(source),
                                                      "overwrite": overwrite}, self.scratch)

    def recorded(self, name: str, settings: Mapping[str, Any], overwrite: bool) -> Source | None:
        """Return the recorded source; None if there is no record, or it has other settings or is damaged.

        A run that is to `overwrite` accepts only records of a run that was also to overwrite.
        """
        path = self._record_path(name)
        try:
            content = read_json(path)
            check_seal(path, content)
        except (FileNotFoundError, ConfigError):
            return None  # treated as not made: it will be made again
        fits = content["settings"] == settings and (content.get("overwrite") or not overwrite)
        return Source.from_json(content["source"]) if fits else None

    def dataset(self) -> list[Path]:
        """List the files beside the folder that make up a dataset, of this form or the older one."""
        return [path for part in ("bin", "idx", "json") if (path := Path(f"{self.prefix}.{part}")).exists()]

    def prune(self, keep: set[str]) -> None:
        """Remove shards not named in `keep`, all records, and the files of a dataset of the older form."""
        for path in self.shards.iterdir():
            if ((ours := OURS.fullmatch(path.name)) and ours[1] not in keep) or path.name.startswith(f"{LOCK}-"):
                path.unlink()
        for part in ("bin", "idx"):
            Path(f"{self.prefix}.{part}").unlink(missing_ok=True)

    def _record_path(self, name: str) -> Path:
        return self.shards / f"{RECORD}{hashlib.sha256(name.encode()).hexdigest()[:NAME_DIGITS]}.json"

    def _remove_if_empty(self, made: list[Path]) -> None:
        """Remove all traces of a run that has finished nothing. Processes waiting for the lock notice this."""
        left = [path for path in self.shards.iterdir() if not path.name.startswith(LOCK)]
        if not left:
            (self.shards / LOCK).unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                for folder in made:
                    folder.rmdir()
