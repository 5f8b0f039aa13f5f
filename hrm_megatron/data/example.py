"""Input rows and their examples: every row gives an `Example`, or a `BadRow` that says where and why it is bad."""
from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

from hrm_megatron.config import ConfigError
from hrm_megatron.data.condition_rules import ConditionRule, condition_by_rule
from hrm_megatron.data.spelling import TAG_TOKENS, tags_of
from hrm_megatron.data.text_files import convert_from, shown

FIELDS = ("condition", "instruction", "response")
AUTO = "auto"  # row shape: to be detected from the first row
JSON_KEYS = "--json-keys"  # the flag that renames them
MAX_CHARACTERS = 2_000_000  # of one text; a long book has more, no context does
SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
BYTES_PER_CHARACTER = 12  # in JSON, at most: \uXXXX twice, outside the basic multilingual plane


class BadRow(ConfigError):
    """A row that cannot be trained on. `kind` is for counting; the message starts with `file:line: `."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind

    def __reduce__(self) -> tuple[type[BadRow], tuple[str, str]]:
        return BadRow, (self.kind, str(self))  # it is pickled in worker processes


class BadRows:
    """The bad rows of a run: the first is raised; with `skip` all are counted and the first of each kind kept."""

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
        """Return a line for each kind of bad row: how many there were, and the first."""
        return [f"skipped {self.count[kind]}: {kind}, first {self.first[kind]}" for kind in sorted(self.count)]


@dataclass(frozen=True)
class RawText:
    """How documents are cut into examples (raw_text.py). `prefix_fraction`: range of the prefix's share, drawn for each
    example from `seed` and the document's text; `sentence_model`: folder of the model that finds sentences, with its
    `fingerprint`; `key`: the field with the text."""

    prefix_fraction: tuple[float, float]
    seed: int
    sentence_model: Path
    fingerprint: str
    key: str = "text"

    def __post_init__(self) -> None:
        low, high = self.prefix_fraction
        if not 0 <= low <= high <= 1:
            raise ConfigError(f"--prefix-fraction {low:g} {high:g}: two numbers of 0 to 1, the smaller first")


@dataclass(frozen=True)
class RowFormat:
    """How rows express examples: the names of condition, instruction and response; the tags of a row without a
    condition, by rule or else by default (None: such a row is bad); the shape of the rows (row_shapes.SHAPES), or how
    documents are cut. No text may exceed `max_characters`. `ignored_fields` beside those of the shape are treated as
    absent."""

    keys: tuple[str, ...] = FIELDS
    default_condition: str | None = None
    max_characters: int = MAX_CHARACTERS
    tags: tuple[str, ...] = tuple(TAG_TOKENS)  # tags of the tokenizer
    shape: str = "fields"
    raw: RawText | None = None
    condition_rules: tuple[ConditionRule, ...] = ()
    ignored_fields: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        try:
            tags_of(self.default_condition or "", self.tags)
        except ConfigError as error:
            raise ConfigError(f"--default-condition {self.default_condition}: {error}") from error
        if self.max_characters < 1:
            raise ConfigError(f"--max-characters {self.max_characters}: must be at least 1")

    @property
    def max_row_bytes(self) -> int:
        """Longest row in bytes that is read at all, whatever it holds besides its texts."""
        return BYTES_PER_CHARACTER * self.max_characters + 65_536

    def settings(self) -> dict[str, object]:
        """Return the settings that, besides the files, decide which examples are read. Not how bad rows are handled:
        with a bad row nothing is made unless bad rows are skipped."""
        settings: dict[str, object] = {
            "json_keys": list(self.keys), "default_condition": self.default_condition,
            "max_characters": self.max_characters, "row_shape": self.shape}
        if self.raw:
            settings |= {"prefix_fraction": list(self.raw.prefix_fraction), "cut_seed": self.raw.seed,
                         "sentence_model": self.raw.fingerprint, "text_key": self.raw.key}
        if self.condition_rules:
            settings["condition_rules"] = [list(astuple(rule)) for rule in self.condition_rules]  # as in JSON
        if self.ignored_fields:
            settings["ignored_fields"] = sorted({*self.ignored_fields})
        return settings


@dataclass(frozen=True)
class Example:
    """One source row, or a part of it. `condition` is a comma-separated list of tags, possibly empty; `defaulted`: it
    is not the row's own. The split key is that of `question`, shared by the examples of one row, else that of the
    instruction."""

    condition: str
    instruction: str
    response: str
    defaulted: bool = field(default=False, compare=False)
    question: str | None = field(default=None, compare=False)


def make_example(row: dict[str, Any], place: str, rows: RowFormat, instruction: str, response: str) -> Example:
    """Add the condition of a row, or that of a rule or the default, to texts taken from it. Raises BadRow."""
    key = rows.keys[0]
    other = rows.default_condition
    if rows.condition_rules and row.get(key) is None:
        by_rule = condition_by_rule(rows.condition_rules, instruction, response)
        other = rows.default_condition if by_rule is None else by_rule
    defaulted = row.get(key) is None and other is not None
    condition = other if defaulted else text_of(row, key, place, JSON_KEYS, ", or give --default-condition")
    example = Example(condition or "", instruction, response, defaulted)
    try:
        if example.condition not in rows.tags:  # most rows have exactly one tag
            tags_of(example.condition, rows.tags)
    except ConfigError as error:
        raise BadRow("unknown tag", f"{place}: {error}") from error
    for text in (instruction, response):
        if len(text) > rows.max_characters:
            raise BadRow("row too long", f"{place}: a text of {len(text):,} characters, --max-characters is "
                                         f"{rows.max_characters}; split it or raise that")
    return example


class Twice:
    """What stands for the value of a field that its JSON object has twice; a row is bad where it is needed."""

    def __repr__(self) -> str:
        return "(there twice)"


def _object(fields: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object; Python's own would drop all but the last value of a field."""
    values = dict(fields)
    if len(values) < len(fields):
        values |= {key: Twice() for key, times in Counter(key for key, _ in fields).items() if times > 1}
    return values


class HalfPair(str):
    """A JSON text with a lone surrogate, at character `at`; only a JSON escape can produce one."""

    at: int


def _with_half_pairs_told(value: Any) -> Any:
    """Return parsed JSON with texts that cannot be encoded as UTF-8 replaced by `HalfPair`."""
    if isinstance(value, dict):
        return {key: _with_half_pairs_told(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_half_pairs_told(item) for item in value]
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            told = HalfPair(value)
            told.at = error.start
            return told
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _loads(text: str) -> Any:
    """Equivalent to json.loads, but for `Twice`, for a text without surrounding whitespace, which it does not look
    for."""
    try:
        value, end = _DECODER.raw_decode(text)
    except json.JSONDecodeError:
        end = -1
    return value if end == len(text) else json.loads(text)


def parse_object(line: bytes, place: str) -> dict[str, Any]:
    """Parse one jsonl line, stripped of whitespace and byte order mark. Raises BadRow."""
    try:
        row = _loads(line.decode("utf-8"))
        if b"\\u" in line and SURROGATE_ESCAPE.search(line):
            row = _with_half_pairs_told(row)
    except UnicodeDecodeError as error:
        raise BadRow("not UTF-8", f"{place}: not UTF-8 ({error.reason} at byte {error.start} of {shown(line)}); "
                                  f"correct the line, or if the file is of another encoding, {convert_from('LATIN1')}"
                     ) from error
    except (ValueError, RecursionError) as error:  # JSON syntax, or an integer too long or nesting too deep for Python
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        raise BadRow("broken JSON", f"{place}: broken JSON ({reason}) in {shown(line)}; correct the line") from error
    if not isinstance(row, dict):
        raise BadRow("broken JSON", f"{place}: {shown(row)} is not a JSON object; write one object per line")
    return row


def text_of(row: dict[str, Any], key: str, place: str, flag: str = "", or_else: str = "") -> str:
    """Return the text of a field. Raises BadRow if it is missing or not a text. `flag`: the flag that names the field,
    if any; `or_else`: a further remedy for the message."""
    value = row.get(key)
    if type(value) is str:
        return value
    if key not in row:
        raise BadRow("missing field", f"{place}: no field {key!r} (there are {shown(sorted(row))}); add it"
                                      f"{f' or name yours with {flag}' if flag else ''}{or_else}")
    if value is None:
        raise BadRow("null field", f"{place}: {key} is null; fill it or drop the row{or_else}")
    if isinstance(value, Twice):
        raise BadRow("field twice", f"{place}: has {key!r} twice; keep one, or drop the row")
    if not isinstance(value, str):
        way_out = ("make one text of it" if isinstance(value, list | dict) else "decode it" if isinstance(value, bytes)
                   else "put it in quotes")
        raise BadRow("field is no string", f"{place}: {key}={shown(value)} is not a string; {way_out}")
    assert isinstance(value, HalfPair)
    raise BadRow("invalid Unicode", f"{place}: {key}={shown(value)} has half a surrogate pair at character "
                                    f"{value.at + 1}; correct the text")


def filled_text_of(row: dict[str, Any], key: str, place: str, flag: str = "") -> str:
    """Return the non-empty text of a field. Raises BadRow."""
    text = text_of(row, key, place, flag)
    if not text or text.isspace():
        raise BadRow("empty field", f"{place}: {key}={shown(text)} is empty; fill it or drop the row")
    return text
