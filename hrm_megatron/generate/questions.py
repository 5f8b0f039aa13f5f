"""What is asked: one instruction, lines of a text file, or rows of jsonl that keep their other fields."""
from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hrm_megatron.config import ConfigError
from hrm_megatron.data.text_files import read_lines, shown

REFERENCE = "reference"  # what an answer file calls the response that a row came with
WRITTEN_ANEW = ("condition", "instruction", "response", "finish")
OF_SOME_ANSWERS = ("responses", "logprobs", "h_cycles")  # which those of this run need not have


def check_text(place: str, text: str) -> None:
    """Refuse a text that no tokenizer takes and no file: how Python takes a command line that is no UTF-8, or half a
    \\u pair."""
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


def of_lines(path: Path, condition: str) -> list[Question]:
    """Read one instruction per line."""
    questions = [Question(f"{path}:{number}", condition, line)
                 for number, line in enumerate(read_lines(path), start=1)]
    if not questions:
        raise ConfigError(f"--prompt-file {path}: empty; write one instruction per line")
    return questions


def of_jsonl(path: Path, condition: str, kept: bool = True) -> list[Question]:
    """Read one question per row; `condition` is that of rows without one. `kept`: answers will keep other fields."""
    questions = list(_rows(path, condition, OF_SOME_ANSWERS if kept else ()))
    if not questions:
        raise ConfigError(f"--input {path}: empty; write one JSON object per line, with a field 'instruction'")
    return questions


def _rows(path: Path, condition: str, refused: Sequence[str]) -> Iterator[Question]:
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            row = json.loads(line)
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
        if refused and "finish" in row and "response" not in row:
            raise ConfigError(f"{place}: has 'finish' without a response, and the answer's would take its place; "
                              "rename it, or leave it out")
        others = {name: value for name, value in row.items() if name not in WRITTEN_ANEW}
        if "response" in row:
            if REFERENCE in row:
                raise ConfigError(f"{place}: has both 'response' and '{REFERENCE}', and the answer file keeps the "
                                  "first under the second's name; rename one")
            others[REFERENCE] = row["response"]
        yield Question(place, texts["condition"], texts["instruction"], others)
