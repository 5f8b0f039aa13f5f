"""Examples and the jsonl files that hold them: every row is an `Example`, or a `BadRow` that says where and why."""
from __future__ import annotations

import glob
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hrm_megatron.config import ConfigError
from hrm_megatron.data.tokenizer import tags_of

FIELDS = ("condition", "instruction", "response")
SHOWN_CHARS = 60


class BadRow(ConfigError):
    """A row that cannot be trained on. `kind` is for counting; the message starts with `file:line: `."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[type[BadRow], tuple[str, str]]:
        return BadRow, (self.kind, str(self))  # it travels back from worker processes


@dataclass(frozen=True)
class Example:
    """One source row. `condition` is a comma-separated list of tags, possibly empty."""

    condition: str
    instruction: str
    response: str


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + "..."


def parse_example(line: bytes, place: str, keys: Sequence[str] = FIELDS) -> Example:
    """Read one jsonl line; `keys` are the names of condition, instruction, response in it. Raises BadRow."""
    line = line.strip()
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        # JSON syntax, UTF-8, or an integer or a nesting that Python refuses
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise BadRow("broken JSON", f"{place}: broken JSON ({reason}) in {_shown(line)}; correct the line") from error
    if not isinstance(row, dict):
        raise BadRow("broken JSON", f"{place}: {_shown(row)} is not a JSON object; write one object per line")
    for key in keys:
        if key not in row:
            raise BadRow("missing field", f"{place}: no field {key!r} (there are {_shown(sorted(row))}); add it or "
                                          "name yours with --json-keys")
        if not isinstance(row[key], str):
            raise BadRow("field is no string", f"{place}: {key}={_shown(row[key])} is not a string; put it in quotes")
        try:
            row[key].encode("utf-8")
        except UnicodeEncodeError as error:
            raise BadRow("invalid Unicode", f"{place}: {key}={_shown(row[key])} has half a surrogate pair at character "
                                            f"{error.start + 1}; correct the text") from error
    example = Example(*(row[key] for key in keys))
    try:
        tags_of(example.condition)
    except ConfigError as error:
        raise BadRow("unknown tag", f"{place}: {error}") from error
    for key, text in zip(keys[1:], (example.instruction, example.response), strict=True):
        if not text.strip():
            raise BadRow("empty field", f"{place}: {key}={_shown(text)} is empty; fill it or drop the row")
    return example


def read_jsonl(path: str | Path, keys: Sequence[str] = FIELDS) -> Iterator[tuple[int, Example]]:
    """Yield (line number from 1, example); blank lines are passed over. The first bad row raises BadRow."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, parse_example(line, f"{path}:{number}", keys)


def find_inputs(inputs: Sequence[str]) -> list[Path]:
    """Resolve files, glob patterns and folders (searched for *.jsonl) in the order given, each file once."""
    found: dict[Path, None] = {}
    for name in inputs:
        path = Path(name)
        if path.is_dir():
            matches = sorted(path.rglob("*.jsonl"))
        elif path.exists():
            matches = [path]
        else:
            matches = sorted(Path(match) for match in glob.glob(name, recursive=True))
        files = [match for match in matches if match.is_file()]
        if not files:
            what = "has no *.jsonl" if path.is_dir() else "matches no file"
            raise ConfigError(f"--input {name} {what}; give files, globs or folders of jsonl")
        found.update(dict.fromkeys(files))
    return list(found)
