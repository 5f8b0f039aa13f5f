"""A file of answers, one JSON line per question in order, which an interrupted run resumes."""
from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from hrm_megatron.config import ConfigError
from hrm_megatron.data.folder_lock import WITHOUT_LOCKS, locked_in_place
from hrm_megatron.generate.questions import Question
from hrm_megatron.program import followed, signals_held, write_aside

log = logging.getLogger(__name__)

# Ignored if the fingerprints of weights agree: an older version wrote the first two wrong, and a folder may have moved.
OF_WEIGHTS = ("weights", "iteration", "checkpoint")


def write_settings(note: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings that determine the answers to `note`."""
    write_aside(note, json.dumps(settings, indent=1) + "\n")


def check_settings(note: Path, settings: Mapping[str, Any], files: str, begun: Path, way_out: str
                   ) -> dict[str, Any]:
    """Raise ConfigError if the answers of `begun` were made with other settings, or the note is damaged; then the user
    has to remove it and `files`.

    Return the contents of the note.
    """
    try:
        before: dict[str, Any] = json.loads(note.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{note}: not JSON ({error}); remove it and {files} to begin again") from error
    check_same(before, settings, begun, way_out)
    return before


def check_same(before: Mapping[str, Any], settings: Mapping[str, Any], begun: Path, way_out: str) -> None:
    """Raise ConfigError if `begun`, made with the settings `before`, has other settings than these."""
    same_weights = before.get("fingerprint") == settings.get("fingerprint") is not None
    for name, value in settings.items():
        if before.get(name) != value and not (same_weights and name in OF_WEIGHTS):
            raise ConfigError(f"{begun}: was begun with {name}={before.get(name)!r}, not {value!r}; go on with that"
                              f"{way_out}")


def noted(questions: Sequence[Question]) -> dict[str, Any]:
    """Return hash and number of the questions, for a note."""
    text = json.dumps([[each.condition, each.instruction, each.others] for each in questions])
    return dict(questions=hashlib.sha256(text.encode()).hexdigest(), question_count=len(questions))


class AnswerFile:
    """Writes lines to NAME.partial, which `finish` renames to NAME.

    NAME.partial.json records the settings that determine the answers. A partial file with other settings or other
    `questions` is refused, never mixed; each line begins with the `fields` of its question.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], overwrite: bool = False,
                 questions: Sequence[Question] = ()) -> None:
        self.path = place = followed(path)
        self.partial, self.note = (place.with_name(f"{place.name}.{end}") for end in ("partial", "partial.json"))
        if path.exists() and (not overwrite or not path.is_file()):
            raise ConfigError(f"--output {path}: exists; choose another" + ", or pass --overwrite" * path.is_file())
        self._settings = json.loads(json.dumps(settings))
        self._questions, self._noted = questions, noted(questions) if questions else {}
        self._file: BinaryIO
        self.done = 0  # complete lines in the file

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
                raise in_use  # it held the lock, and has renamed the file since
        except BlockingIOError as error:
            raise in_use from error
        except OSError as error:
            log.warning(WITHOUT_LOCKS, self.path.parent, error.strerror)
        if self.partial.stat().st_size == 0:
            # Also over a note whose file was removed: it is of no answer.
            write_settings(self.note, self._settings | self._noted)
            return
        if not self.note.exists():  # the note is written before the first answer
            raise ConfigError(f"{self.partial}: has no {self.note.name} beside it that says what it was made with; "
                              "choose another --output, or move it away")
        way_out = f", choose another --output, or remove it and {self.note.name}"
        before = check_settings(self.note, self._settings, f"{self.partial}", self.partial, way_out)
        self._file.seek(0)
        whole = 0
        for line in self._file:
            if line.endswith(b"\n"):  # else the run stopped in the middle of it
                whole, self.done = whole + len(line), self.done + 1
        if self._questions and before.get("questions") != self._noted["questions"]:
            raise ConfigError(f"{self.partial}: was begun with other questions ({self._difference(before)}); give the "
                              f"former ones (--input, --prompt-file or --prompt){way_out}")
        self._file.truncate(whole)

    def _difference(self, before: Mapping[str, Any]) -> str:
        """Return a text that says where the questions differ from those of the lines, or in their number."""
        self._file.seek(0)
        for number, line, question in zip(range(1, self.done + 1), self._file, self._questions, strict=False):
            if not line.startswith(json.dumps(question.fields)[:-1].encode()):
                return f"{question.place} is not what its line {number} answers"
        count = len(self._questions)
        if (known := before.get("question_count", count)) != count:
            return f"{known} of them, not {count}"
        return f"of which the first {self.done} are the same"

    def write(self, record: Mapping[str, Any]) -> None:
        """Append the next answer."""
        try:
            self._file.write(json.dumps(record).encode() + b"\n")  # ASCII: no reader splits it at U+2028 etc.
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.partial)) from error

    def finish(self) -> None:
        """Rename NAME.partial to NAME."""
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
            if error is None:  # else the failed write is already reported, and close has tried it again
                raise
