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


@dataclass(frozen=True)
class Shape:
    """A shape of rows: the fields that tell it (of each tuple one), fields that may be there, and its reader.

    `examples` takes (row, place, format, counts of what was handled) and raises BadRow.
    """

    fields: Callable[[RowFormat], tuple[tuple[str, ...], ...]]
    examples: Callable[[Row, str, RowFormat, Counter[str]], list[Example]]
    optional: tuple[str, ...] = ()

    def fits(self, names: Iterable[str], rows: RowFormat) -> bool:
        return _has_all(tuple(names), self.fields(rows))


@lru_cache
def _has_all(names: tuple[str, ...], fields: tuple[tuple[str, ...], ...]) -> bool:
    """Say whether of each tuple of alternatives one is among the names, which most rows have in common."""
    return all(any(name in names for name in alternatives) for alternatives in fields)


def _from_fields(row: Row, place: str, rows: RowFormat, noted: Counter[str]) -> list[Example]:
    instruction, response = (filled_text_of(row, key, place, JSON_KEYS) for key in rows.keys[1:])
    return [make_example(row, place, rows, instruction, response)]


def _from_alpaca(row: Row, place: str, rows: RowFormat, noted: Counter[str]) -> list[Example]:
    """The instruction, a blank line and the input, if there is one."""
    instruction = filled_text_of(row, "instruction", place)
    if row.get("input") is not None and (more := text_of(row, "input", place)).strip():
        instruction = f"{instruction}\n\n{more}"
    return [make_example(row, place, rows, instruction, filled_text_of(row, "output", place))]


SHAPES: Mapping[str, Shape] = {  # in the order in which a row is held against them
    "fields": Shape(lambda rows: ((rows.keys[1],), (rows.keys[2],)), _from_fields),
    "messages": Shape(lambda rows: (TURN_LISTS,), chat_examples),
    "alpaca": Shape(lambda rows: (("instruction",), ("output",)), _from_alpaca, ("input",)),
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
    wanted = {rows.keys[0], *shape.optional}.union(*shape.fields(rows))
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
    return shape.examples(row, place, rows, noted)
