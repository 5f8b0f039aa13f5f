"""Questions: one instruction, the lines of a text file, or rows of a jsonl file, whose other fields are kept."""
from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hrm_megatron.config import ConfigError
from hrm_megatron.data.text_files import read_lines, shown

REFERENCE = "reference"  # field of an answer file for the response that the input row had
WRITTEN_ANEW = ("condition", "instruction", "response", "finish")
OF_SOME_ANSWERS = ("responses", "logprobs", "h_cycles")  # fields that not every answer record has


def check_text(place: str, text: str) -> None:
    """Refuse a text that is not valid UTF-8, from a command line in another encoding or half a \\u surrogate pair in
    JSON: neither a tokenizer nor a file accepts it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(f"{place} {shown(text)}: not UTF-8 at character {error.start + 1}; correct it") from error


@dataclass(frozen=True)
class Question:
    """An instruction with its condition; `place` names it in messages, `others` are kept beside the answer."""

    place: str
    condition: str
    instruction: str
    others: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_text(self.place, self.instruction)
        if not self.instruction.strip():
            raise ConfigError(f"{self.place}: empty instruction; write one, or leave it out")

    @property
    def fields(self) -> dict[str, Any]:
        """The first fields of the record of an answer."""
        return dict(self.others, condition=self.condition, instruction=self.instruction)


def _lines(flag: str, path: Path) -> list[str]:
    try:
        return read_lines(path)
    except OSError as error:
        raise ConfigError(f"{flag} {path}: cannot be read ({error.strerror}); name a text file") from error


def of_lines(path: Path, condition: str) -> list[Question]:
    """Read one instruction per line."""
    questions = [Question(f"{path}:{number}", condition, line)
                 for number, line in enumerate(_lines("--prompt-file", path), start=1)]
    if not questions:
        raise ConfigError(f"--prompt-file {path}: empty; write one instruction per line")
    return questions


def of_jsonl(path: Path, condition: str, kept: bool = True) -> list[Question]:
    """Read one question per row; `condition` is for rows without one. `kept`: other fields will be kept beside
    answers."""
    questions = list(_rows(path, condition, kept))
    if not questions:
        raise ConfigError(f"--input {path}: empty; write one JSON object per line, with a field 'instruction'")
    return questions


def _finite(number: str) -> float:
    """Parse a number, refusing those that JSON cannot represent."""
    if math.isfinite(value := float(number)):
        return value
    raise ConfigError(f"{shown(number)} is not a finite number, as JSON needs; write null or a string")


def _object(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object, refusing one that has a field twice: only one would be asked or kept."""
    values: dict[str, Any] = {}
    for key, value in fields:
        if key in values:
            raise ConfigError(f"has {key!r} twice; keep one")
        values[key] = value
    return values


def _rows(path: Path, condition: str, kept: bool) -> Iterator[Question]:
    refused, number_of = (OF_SOME_ANSWERS, _finite) if kept else ((), float)
    for number, line in enumerate(_lines("--input", path), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            row = json.loads(line, parse_float=number_of, parse_constant=number_of, object_pairs_hook=_object)
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from error
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{place}: broken JSON ({error}) in {shown(line)}; correct the line") from error
        if not isinstance(row, dict):
            raise ConfigError(f"{place}: {shown(row)} is not a JSON object; write one object per line")
        texts = {"condition": condition, **{name: row[name] for name in ("condition", "instruction") if name in row}}
        for name in ("condition", "instruction"):
            if not isinstance(texts.get(name), str):
                raise ConfigError(f"{place}: {name}={shown(texts.get(name))} is not a string; write one")
        if taken := [name for name in refused if name in row]:
            raise ConfigError(f"{place}: has {taken[0]!r}, which would stand beside another answer; rename it, or "
                              "leave it out")
        if kept and "finish" in row and "response" not in row:
            raise ConfigError(f"{place}: has 'finish' without a response, and the answer's would take its place; "
                              "rename it, or leave it out")
        others = {name: value for name, value in row.items() if name not in WRITTEN_ANEW}
        if "response" in row:
            if REFERENCE in row:
                raise ConfigError(f"{place}: has both 'response' and '{REFERENCE}', and the answer file keeps the "
                                  "first under the second's name; rename one")
            others[REFERENCE] = row["response"]
        yield Question(place, texts["condition"], texts["instruction"], others)
