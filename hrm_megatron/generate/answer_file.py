"""A file of answers, one JSON line per question in their order, which an interrupted run goes on with."""
from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from hrm_megatron.config import ConfigError
from hrm_megatron.data.folder_lock import WITHOUT_LOCKS, locked_in_place
from hrm_megatron.program import followed, signals_held, write_aside

log = logging.getLogger(__name__)

# What the fingerprint of weights decides: an older version had the first two wrong, and a folder may have moved.
OF_WEIGHTS = ("weights", "iteration", "checkpoint")


def write_settings(note: Path, settings: Mapping[str, Any]) -> None:
    """Write down what decides the answers beside it."""
    write_aside(note, json.dumps(settings, indent=1) + "\n")


def check_settings(note: Path, settings: Mapping[str, Any], files: str, begun: Path, way_out: str) -> None:
    """Refuse `begun`, whose answers were made with other settings than these; `files` go with a damaged note."""
    try:
        before = json.loads(note.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{note}: not JSON ({error}); remove it and {files} to begin again") from error
    check_same(before, settings, begun, way_out)


def check_same(before: Mapping[str, Any], settings: Mapping[str, Any], begun: Path, way_out: str) -> None:
    """Refuse `begun`, which was made with the settings `before`, if these are others."""
    same_weights = before.get("fingerprint") == settings.get("fingerprint") is not None
    for name, value in settings.items():
        if before.get(name) != value and not (same_weights and name in OF_WEIGHTS):
            raise ConfigError(f"{begun}: was begun with {name}={before.get(name)!r}, not {value!r}; go on with that"
                              f"{way_out}")


class AnswerFile:
    """Lines go to NAME.partial, which takes NAME when `finish` says that it is whole.

    NAME.partial.json keeps what decides the answers: a partial file of other settings is refused, never mixed.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], overwrite: bool = False) -> None:
        self.path = place = followed(path)
        self.partial, self.note = (place.with_name(f"{place.name}.{end}") for end in ("partial", "partial.json"))
        if path.exists() and (not overwrite or not path.is_file()):
            raise ConfigError(f"--output {path}: exists; choose another" + ", or pass --overwrite" * path.is_file())
        self._settings = json.loads(json.dumps(settings))
        self._file: BinaryIO
        self.done = 0  # lines that are there

    def __enter__(self) -> AnswerFile:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.partial, "a+b")  # closed in __exit__
        try:
            self._begin()
        except BaseException:
            self._file.close()
            raise
        return self

    def _begin(self) -> None:
        in_use = ConfigError(f"--output {self.path}: another process is writing it; choose another")
        try:
            if not locked_in_place(self._file.fileno(), self.partial):
                raise in_use  # it was, and has given the file its name since
        except BlockingIOError as error:
            raise in_use from error
        except OSError as error:
            log.warning(WITHOUT_LOCKS, self.path.parent, error.strerror)
        if self.partial.stat().st_size == 0:
            write_settings(self.note, self._settings)  # also over a note whose file was removed: it is of no answer
            return
        if not self.note.exists():  # which is written before the first answer
            raise ConfigError(f"{self.partial}: has no {self.note.name} beside it that says what it was made with; "
                              "choose another --output, or move it away")
        check_settings(self.note, self._settings, f"{self.partial}", self.partial,
                       f", choose another --output, or remove it and {self.note.name}")
        self._file.seek(0)
        whole = 0
        for line in self._file:
            if line.endswith(b"\n"):  # else the stop fell into it
                whole, self.done = whole + len(line), self.done + 1
        self._file.truncate(whole)

    def write(self, record: Mapping[str, Any]) -> None:
        """Append the next answer."""
        try:
            self._file.write(json.dumps(record).encode() + b"\n")  # ASCII: no reader splits it at U+2028 and the like
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.partial)) from error

    def finish(self) -> None:
        """Give the file its name."""
        os.fsync(self._file.fileno())
        if self.path.exists():
            shutil.copymode(self.path, self.partial)
        with signals_held():
            self.partial.rename(self.path)
            self.note.unlink()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        try:
            self._file.close()
        except OSError:
            if error is None:  # else it is told already: what could not be written is tried once more
                raise
