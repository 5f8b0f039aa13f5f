"""Examples and the jsonl files that hold them: every row is an `Example`, or a `BadRow` that says where and why."""
from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hrm_megatron.config import ConfigError
from hrm_megatron.data.text_files import convert_from, shown, without_mark
from hrm_megatron.data.tokenizer import tags_of

FIELDS = ("condition", "instruction", "response")


class BadRow(ConfigError):
    """A row that cannot be trained on. `kind` is for counting; the message starts with `file:line: `."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[type[BadRow], tuple[str, str]]:
        return BadRow, (self.kind, str(self))  # it travels back from worker processes


class BadRows:
    """The bad rows of a run: the first is raised, or with `skip` all are counted and the first of each kind kept."""

    def __init__(self, skip: bool = False) -> None:
        self.skip = skip
        self.count: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def take(self, row: BadRow) -> None:
        if not self.skip:
            raise row
        self.count[row.kind] += 1
        self.first.setdefault(row.kind, str(row))

    def lines(self) -> list[str]:
        """Say per kind of bad row how many there were, and the first of them."""
        return [f"skipped {self.count[kind]}: {kind}, first {self.first[kind]}" for kind in sorted(self.count)]


@dataclass(frozen=True)
class RowFormat:
    """How rows spell an example: the names of condition, instruction and response, and the tags of a row without a
    condition (None: such a row is bad)."""

    keys: tuple[str, ...] = FIELDS
    default_condition: str | None = None

    def __post_init__(self) -> None:
        try:
            tags_of(self.default_condition or "")
        except ConfigError as error:
            raise ConfigError(f"--default-condition {self.default_condition}: {error}") from error


@dataclass(frozen=True)
class Example:
    """One source row. `condition` is a comma-separated list of tags, possibly empty; `defaulted`: not the row's own."""

    condition: str
    instruction: str
    response: str
    defaulted: bool = field(default=False, compare=False)


def parse_example(line: bytes, place: str, rows: RowFormat = RowFormat()) -> Example:
    """Read one jsonl line. Raises BadRow."""
    row = _parse_object(line, place)
    defaulted = row.get(rows.keys[0]) is None and rows.default_condition is not None
    if defaulted:
        row[rows.keys[0]] = rows.default_condition
    for key in rows.keys:
        _check_text(row, key, place, or_else=", or give --default-condition" if key == rows.keys[0] else "")
    condition, instruction, response = (row[key] for key in rows.keys)
    example = Example(condition, instruction, response, defaulted)
    try:
        tags_of(example.condition)
    except ConfigError as error:
        raise BadRow("unknown tag", f"{place}: {error}") from error
    for key, text in zip(rows.keys[1:], (example.instruction, example.response), strict=True):
        if not text.strip():
            raise BadRow("empty field", f"{place}: {key}={shown(text)} is empty; fill it or drop the row")
    return example


def _parse_object(line: bytes, place: str) -> dict[str, Any]:
    line = without_mark(line)
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise BadRow("not UTF-8", f"{place}: not UTF-8 ({error.reason} at byte {error.start} of {shown(line)}); "
                                  f"correct the line, or if the file is of another encoding, {convert_from('LATIN1')}"
                     ) from error
    except (ValueError, RecursionError) as error:  # JSON syntax, or an integer or a nesting that Python refuses
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise BadRow("broken JSON", f"{place}: broken JSON ({reason}) in {shown(line)}; correct the line") from error
    if not isinstance(row, dict):
        raise BadRow("broken JSON", f"{place}: {shown(row)} is not a JSON object; write one object per line")
    return row


def _check_text(row: dict[str, Any], key: str, place: str, or_else: str) -> None:
    """Refuse a field that is not there or is no text; `or_else` is one more way out."""
    if key not in row:
        raise BadRow("missing field", f"{place}: no field {key!r} (there are {shown(sorted(row))}); add it or name "
                                      f"yours with --json-keys{or_else}")
    value = row[key]
    if value is None:
        raise BadRow("null field", f"{place}: {key} is null; fill it or drop the row{or_else}")
    if not isinstance(value, str):
        way_out = "make one text of it" if isinstance(value, list | dict) else "put it in quotes"
        raise BadRow("field is no string", f"{place}: {key}={shown(value)} is not a string; {way_out}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRow("invalid Unicode", f"{place}: {key}={shown(value)} has half a surrogate pair at character "
                                        f"{error.start + 1}; correct the text") from error


def read_jsonl(path: str | Path, rows: RowFormat = RowFormat(),
               bad_rows: BadRows | None = None) -> Iterator[tuple[int, Example]]:
    """Yield (line number from 1, example); blank lines are passed over. Bad rows go to `bad_rows`, else are raised."""
    bad_rows = bad_rows or BadRows()
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if without_mark(line):
                try:
                    example = parse_example(line, f"{path}:{number}", rows)
                except BadRow as error:
                    bad_rows.take(error)
                    continue
                yield number, example
