"""How rows spell examples: the shapes in which instruction data is published, told from the first row."""
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


INPUT = "input"  # what an `instruction` is about
SYSTEM = ("system", "system_prompt")  # one of them: a system message, which every shape puts in front
CONTEXT = ("context", "documents", "history", "tools", "functions")  # parts of prompts that no shape spells
EMPTY = ("", "[]", "{}", "null")  # which such fields may hold, as JSON in a text too


@dataclass(frozen=True)
class Shape:
    """A shape of rows: the fields that tell it (of each tuple one), its reader, and what else belongs to its prompts:
    fields that the reader takes where they are there, and `lost` ones, which must be empty.

    `examples` takes (row, place, format, counts of what was handled) and raises BadRow.
    """

    fields: Callable[[RowFormat], tuple[tuple[str, ...], ...]]
    examples: Callable[[Row, str, RowFormat, Counter[str]], list[Example]]
    optional: tuple[str, ...] = SYSTEM
    lost: Callable[[RowFormat], tuple[str, ...]] = lambda rows: CONTEXT

    def beside(self, rows: RowFormat) -> list[str]:
        """Name the fields that must not be overlooked, beside those that tell the shape."""
        return _of_ours((*self.optional, *self.lost(rows)), rows)

    def fits(self, names: Iterable[str], rows: RowFormat) -> bool:
        return _has_all(tuple(names), self.fields(rows))


@lru_cache
def _has_all(names: tuple[str, ...], fields: tuple[tuple[str, ...], ...]) -> bool:
    """Say whether of each tuple of alternatives one is among the names, which most rows have in common."""
    return all(any(name in names for name in alternatives) for alternatives in fields)


def _from_fields(row: Row, place: str, rows: RowFormat, noted: Counter[str]) -> list[Example]:
    return _from_texts(row, place, rows, rows.keys[1], rows.keys[2], JSON_KEYS)


def _from_alpaca(row: Row, place: str, rows: RowFormat, noted: Counter[str]) -> list[Example]:
    return _from_texts(row, place, rows, "instruction", "output")


def _from_texts(row: Row, place: str, rows: RowFormat, asked: str, answered: str, flag: str = "") -> list[Example]:
    """The system message, the instruction and its input, as far as there are some, with blank lines between."""
    more = _texts_beside(row, (INPUT,), place, rows) if asked == "instruction" else []
    texts = [*_system(row, place, rows), filled_text_of(row, asked, place, flag), *more]
    return [make_example(row, place, rows, "\n\n".join(texts), filled_text_of(row, answered, place, flag))]


def _from_chat(row: Row, place: str, rows: RowFormat, noted: Counter[str]) -> list[Example]:
    return chat_examples(row, place, rows, noted, *_system(row, place, rows))


def _system(row: Row, place: str, rows: RowFormat) -> list[str]:
    """The system message that stands in a field of its own, if one does."""
    texts = {text.strip(): text for text in _texts_beside(row, SYSTEM, place, rows)}
    if len(texts) > 1:
        raise BadRow("two system messages", f"{place}: {' and '.join(SYSTEM)} have different texts; drop one")
    return [*texts.values()]


def _texts_beside(row: Row, names: Iterable[str], place: str, rows: RowFormat) -> list[str]:
    """The texts of those of the fields that have one."""
    texts = [text_of(row, key, place) for key in _of_ours(names, rows) if row.get(key) is not None]
    return [text for text in texts if text.strip()]


def _is_lost(row: Row, key: str, rows: RowFormat) -> bool:
    """Say whether there is something in a field that nobody reads."""
    return not _is_empty(row.get(key)) and bool(_of_ours((key,), rows))


def _is_empty(value: Any) -> bool:
    """Say whether there is no text at any depth: Arrow gives all structs of a column the same fields, of nulls."""
    found = [value]
    for item in found:  # which grows: nesting may be deep
        if isinstance(item, dict | list):
            found += item.values() if isinstance(item, dict) else item
        elif item and not (isinstance(item, str) and item.strip() in EMPTY):
            return False
    return True


def _of_ours(names: Iterable[str], rows: RowFormat) -> list[str]:
    """Choose the names that --json-keys gives no other meaning, and that are not to be ignored."""
    return [name for name in names if name not in rows.keys and name not in rows.ignored_fields]


SHAPES: Mapping[str, Shape] = {  # in the order in which a row is held against them
    "fields": Shape(lambda rows: ((rows.keys[1],), (rows.keys[2],)), _from_fields, (*SYSTEM, INPUT),
                    lambda rows: CONTEXT if rows.keys[1] == "instruction" else (INPUT, *CONTEXT)),
    "messages": Shape(lambda rows: (TURN_LISTS,), _from_chat),
    "alpaca": Shape(lambda rows: (("instruction",), ("output",)), _from_alpaca, (*SYSTEM, INPUT)),
}


def shape_of(names: Iterable[str], rows: RowFormat) -> str | None:
    """Tell the shape of a row by the names of its fields."""
    names = set(names)
    return next((name for name, shape in SHAPES.items() if shape.fits(names, rows)), None)


def fields_to_read(names: Sequence[str], rows: RowFormat) -> list[str]:
    """Choose what is needed of the fields of a file; all, where rows of it will be bad, which are then shown whole."""
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
    """Take the examples out of a row, and count in `noted` what was handled on the way. Raises BadRow.

    `sizes` is what a document is cut by.
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
