"""Read Parquet and Arrow columns directly into columns of texts if all rows are plain; see plain_rows.py."""
from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from hrm_megatron.data.characters import Texts
from hrm_megatron.data.example import RowFormat
from hrm_megatron.data.example_batch import ExampleBatch
from hrm_megatron.data.readers.plain_rows import are_fields, good_rows, surely_short
from hrm_megatron.data.row_shapes import SHAPES

NOTHING, NUL = (pa.scalar(value, pa.large_binary()) for value in (b"", b"\0"))


def plain_columns(table: pa.Table, place: Callable[[int], str], rows: RowFormat) -> ExampleBatch | None:
    """Return the examples of a table whose column names are unique; None unless all rows are plain and good."""
    if not are_fields(rows) or not table.num_rows:
        return None
    beside = {*SHAPES[rows.shape].beside(rows)}.intersection(table.column_names)
    if not all(_is_empty(table.column(name)) for name in beside):
        return None
    condition, *texts = (_octets(table, key) for key in rows.keys)
    if condition is None:
        if rows.keys[0] in table.column_names:
            return None
        condition = pa.nulls(table.num_rows, pa.large_binary())
    if any(column is None or column.null_count for column in texts):
        return None
    lengths = np.stack([pc.binary_length(column).to_numpy() for column in texts], 1).reshape(-1)
    if not surely_short(lengths, rows):
        return None
    # Joined row by row with a NUL after each text; the joined column is one contiguous buffer.
    joined = pc.binary_join_element_wise(*texts, NOTHING, NUL)
    _, offsets, octets = joined.buffers()
    start, end = np.frombuffer(offsets, np.int64)[[joined.offset, joined.offset + len(joined)]]
    utf8 = octets.slice(start, end - start).to_pybytes()
    given = condition.to_pylist()
    try:
        for found in (utf8, *filter(None, {*given})):
            found.decode()
    except UnicodeDecodeError:
        return None
    return good_rows(Texts(utf8, np.cumsum(lengths + 1)), given, place, rows)


def _is_empty(column: pa.ChunkedArray) -> bool:
    """Return whether a column is empty in all rows: a schema shared by many kinds of rows leaves many such columns."""
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return not pc.any(pc.not_equal(column, "")).as_py()
    return column.null_count == len(column)


def _octets(table: pa.Table, name: str) -> pa.LargeBinaryArray | None:
    """Return the texts of a column as bytes; None if there is no such column, or it is not text."""
    if name not in table.column_names:
        return None
    column = table.column(name).combine_chunks()
    if pa.types.is_string(column.type):
        return column.view(pa.binary()).cast(pa.large_binary())
    return column.view(pa.large_binary()) if pa.types.is_large_string(column.type) else None
