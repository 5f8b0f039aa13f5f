"""How input rows express examples: the shapes in which instruction data is published, detected from the first row."""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from hrm_megatron.data.chat import TURN_LISTS, chat_examples
from hrm_megatron.data.example import JSON_KEYS, BadRow, Example, RowFormat, filled_text_of, make_example, text_of
from hrm_megatron.data.raw_text import BY_CHARACTERS, Sizes, document_examples
from hrm_megatron.data.text_files import shown

Row = dict[str, Any]


INPUT = "input"  # the input that an `instruction` refers to
SYSTEM = ("system", "system_prompt")  # one of them: a system message, which every shape puts first
CONTEXT = ("context", "documents", "history", "tools", "functions")  # parts of prompts that no shape uses
EMPTY = ("", "[]", "{}", "null")  # values with which such fields count as empty, also as JSON text


@dataclass(frozen=True)
class Shape:
    """A shape of rows: the fields that identify it (one of each tuple), its reader, and further fields of its prompts:
    `optional` ones are used if present, `lost` ones must be empty.

    `examples` takes (row, place, format, counts of events) and raises BadRow.
    """

    fields: Callable[[RowFormat], tuple[tuple[str, ...], ...]]
    examples: Callable[[Row, str, RowFormat, Counter[str]], list[Example]]
    optional: tuple[str, ...] = SYSTEM
    lost: Callable[[RowFormat], tuple[str, ...]] = lambda rows: CONTEXT

    def beside(self, rows: RowFormat) -> list[str]:
        """Return the fields that must not be overlooked, beside those that identify the shape."""
        return _of_ours((*self.optional, *self.lost(rows)), rows)

    def fits(self, names: Iterable[str], rows: RowFormat) -> bool:
        return _has_all(tuple(names), self.fields(rows))


@lru_cache
def _has_all(names: tuple[str, ...], fields: tuple[tuple[str, ...], ...]) -> bool:
    """Return whether of each tuple of alternatives one is among the names. Cached: most rows have the same names."""
    return all(any(name in names for name in alternatives) for alternatives in fields)


def _from_fields(row: Row, place: str, rows: RowFormat, noted: Counter[str]) -> list[Example]:
    return _from_texts(row, place, rows, rows.keys[1], rows.keys[2], JSON_KEYS)


def _from_alpaca(row: Row, place: str, rows: RowFormat, noted: Counter[str]) -> list[Example]:
    return _from_texts(row, place, rows, "instruction", "output")


def _from_texts(row: Row, place: str, rows: RowFormat, asked: str, answered: str, flag: str = "") -> list[Example]:
    """Join the system message, the instruction and its input, as far as present, by blank lines."""
    more = _texts_beside(row, (INPUT,), place, rows) if asked == "instruction" else []
    texts = [*_system(row, place, rows), filled_text_of(row, asked, place, flag), *more]
    return [make_example(row, place, rows, "\n\n".join(texts), filled_text_of(row, answered, place, flag))]


def _from_chat(row: Row, place: str, rows: RowFormat, noted: Counter[str]) -> list[Example]:
    return chat_examples(row, place, rows, noted, *_system(row, place, rows))


def _system(row: Row, place: str, rows: RowFormat) -> list[str]:
    """Return the system message that a row has in a field of its own, if any."""
    texts = {text.strip(): text for text in _texts_beside(row, SYSTEM, place, rows)}
    if len(texts) > 1:
        raise BadRow("two system messages", f"{place}: {' and '.join(SYSTEM)} have different texts; drop one")
    return [*texts.values()]


def _texts_beside(row: Row, names: Iterable[str], place: str, rows: RowFormat) -> list[str]:
    """Return the non-empty texts of these fields."""
    texts = [text_of(row, key, place) for key in _of_ours(names, rows) if row.get(key) is not None]
    return [text for text in texts if text.strip()]


def _is_lost(row: Row, key: str, rows: RowFormat) -> bool:
    """Return whether a field that no reader uses holds something."""
    return not _is_empty(row.get(key)) and bool(_of_ours((key,), rows))


def _is_empty(value: Any) -> bool:
    """Return whether a value holds no text at any depth: Arrow fills the fields that a struct lacks with nulls."""
    found = [value]
    for item in found:  # grows while iterating: nesting may be too deep for recursion
        if isinstance(item, dict | list):
            found += item.values() if isinstance(item, dict) else item
        elif item and not (isinstance(item, str) and item.strip() in EMPTY):
            return False
    return True


def _of_ours(names: Iterable[str], rows: RowFormat) -> list[str]:
    """Return the names that --json-keys gives no other meaning and that are not ignored."""
    return [name for name in names if name not in rows.keys and name not in rows.ignored_fields]


SHAPES: Mapping[str, Shape] = {  # in the order in which they are tried
    "fields": Shape(lambda rows: ((rows.keys[1],), (rows.keys[2],)), _from_fields, (*SYSTEM, INPUT),
                    lambda rows: CONTEXT if rows.keys[1] == "instruction" else (INPUT, *CONTEXT)),
    "messages": Shape(lambda rows: (TURN_LISTS,), _from_chat),
    "alpaca": Shape(lambda rows: (("instruction",), ("output",)), _from_alpaca, (*SYSTEM, INPUT)),
}


def shape_of(names: Iterable[str], rows: RowFormat) -> str | None:
    """Return the shape of a row with these field names; None if it has none."""
    names = set(names)
    return next((name for name, shape in SHAPES.items() if shape.fits(names, rows)), None)


def fields_to_read(names: Sequence[str], rows: RowFormat) -> list[str]:
    """Return the fields to read; all if rows will be bad, because messages list the fields of a bad row."""
    if rows.raw:
        chosen = [name for name in names if name in (rows.keys[0], rows.raw.key)]
        return chosen if rows.raw.key in names else list(names)
    shape = SHAPES[rows.shape]
    if not shape.fits(names, rows):
        return list(names)
    wanted = {rows.keys[0], *shape.beside(rows)}.union(*shape.fields(rows))
    return [name for name in names if name in wanted]


def examples_of(row: Row, place: str, rows: RowFormat, noted: Counter[str] | None = None,
                sizes: Sizes = BY_CHARACTERS) -> list[Example]:
    """Return the examples of a row, and count events in `noted`. Raises BadRow.

    Documents are cut by `sizes`.
    """
    noted = Counter() if noted is None else noted
    if rows.raw:
        return document_examples(row, place, rows, rows.raw, noted, sizes)
    shape = SHAPES[rows.shape]
    if not shape.fits(row, rows):
        if other := shape_of(row, rows):
            raise BadRow("mixed row shapes", f"{place}: a row of shape {other} ({shown(sorted(row))}) among rows "
                         f"of shape {rows.shape}; read them in two runs, each with its --row-shape, or make them alike")
        if "text" in row:
            raise BadRow("plain text", f"{place}: a document (its fields: {shown(sorted(row))}); --split-sentences "
                                       "makes examples of such")
    elif lost := next((key for key in shape.lost(rows) if _is_lost(row, key, rows)), None):
        raise BadRow("lost field", f"{place}: {lost}={shown(row[lost])} belongs to the prompt and would be lost; write "
                                   f"it into the question, or give --ignore-fields {lost}")
    return shape.examples(row, place, rows, noted)
