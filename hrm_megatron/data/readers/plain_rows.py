"""Read jsonl lines directly into columns of texts if all rows are plain, without a Python object per row or text.

json takes five times as long to parse a line as copying its texts out of it. A faster decoder that accepts or refuses
anything else than Python's would give other rows or other messages; so lines are read here only if they are unambiguous
(json_kernels.py), and only if all rows are good by cheap, conservative bounds. If one line is not, all lines of the
piece are read one by one, by the reader that defines the semantics.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import numpy as np

from hrm_megatron.config import ConfigError
from hrm_megatron.data.characters import Texts
from hrm_megatron.data.example import RowFormat
from hrm_megatron.data.example_batch import BATCH_CHARACTERS, ExampleBatch
from hrm_megatron.data.row_shapes import SHAPES
from hrm_megatron.data.spelling import tags_of

LEAST_ROW_BYTES = len('{"":"","":""}\n')


def plain_rows(text: bytes, file_name: str, first_line: int, rows: RowFormat) -> ExampleBatch | None:
    """Read whole lines, the first numbered `first_line` in the file; None unless all rows are plain and good."""
    if not are_fields(rows):
        return None
    from hrm_megatron.data.readers.json_kernels import join_texts, rows_of_lines  # late: numba takes half a second
    if not text.endswith(b"\n"):
        text += b"\n"
    octets = np.frombuffer(text, np.uint8)
    names = [json.dumps(key, ensure_ascii=False).encode("utf-8", "surrogatepass")
             for key in (*rows.keys, *SHAPES[rows.shape].beside(rows))]
    most = len(text) // LEAST_ROW_BYTES + 1  # untouched pages cost no physical memory
    found, lines = np.empty((most, 2 * len(rows.keys)), np.int64), np.empty(most, np.int64)
    count = rows_of_lines(octets, np.frombuffer(b"".join(names), np.uint8), np.cumsum([len(name) for name in names]),
                          rows.max_row_bytes, found, lines)
    if count < 1:
        return None
    spans = found[:count, 2:].reshape(-1, 2)
    lengths = spans[:, 1] - spans[:, 0]  # in bytes of escaped JSON
    if not surely_short(lengths, rows):
        return None
    given = [text[start:end] if start >= 0 else None for start, end in found[:count, :2].tolist()]
    if any(b"\\" in condition for condition in {*given} if condition):
        return None
    joined, ends = np.empty(int(lengths.sum()) + len(spans), np.uint8), np.empty(len(spans), np.int64)
    texts = Texts(joined[:join_texts(octets, spans, joined, ends)].tobytes(), ends)
    numbers = (lines[:count] + first_line).tolist()
    return good_rows(texts, given, lambda i: f"{file_name}:{numbers[i]}", rows)


def are_fields(rows: RowFormat) -> bool:
    """Return whether rows have their texts in fields of their own."""
    return rows.shape == "fields" and not rows.raw


def surely_short(lengths: np.ndarray, rows: RowFormat) -> bool:
    """Return whether texts of these byte lengths (a character takes at least one) are short enough for one batch."""
    return bool(lengths.max() <= rows.max_characters and lengths.sum() < BATCH_CHARACTERS)


def good_rows(texts: Texts, given: Sequence[bytes | None], place: Callable[[int], str],
              rows: RowFormat) -> ExampleBatch | None:
    """Return the examples with these texts and UTF-8 conditions (None: the row has none); None unless all are good."""
    conditions = _conditions(given, rows)
    if conditions is None or (texts.stripped[:, 0] == texts.stripped[:, 1]).any():
        return None
    return ExampleBatch(place, conditions, texts, [condition is None for condition in given])


def _conditions(given: Sequence[bytes | None], rows: RowFormat) -> list[str] | None:
    """Return the tags of every row, the default ones where it has none; None if any are invalid."""
    known: dict[bytes | None, str] = {}
    for condition in set(given):
        if condition is not None:
            known[condition] = condition.decode()
        elif rows.default_condition is None or rows.condition_rules:
            return None
        else:
            known[None] = rows.default_condition
    try:
        for tags in known.values():
            tags_of(tags, rows.tags)
    except ConfigError:
        return None
    return [known[condition] for condition in given]
