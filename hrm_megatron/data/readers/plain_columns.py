"""Columns of Parquet and Arrow straight to columns of texts where every row is plain, as plain_rows.py reads jsonl."""
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
    """Take the examples out of a table whose columns have names of their own; None unless all rows are plain and good.
    """
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
    # One row after the other, a NUL behind each text: what joins the columns keeps their bytes together.
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
    """Say whether no row has anything in a column: one schema for many kinds of rows leaves many columns so."""
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        return not pc.any(pc.not_equal(column, "")).as_py()
    return column.null_count == len(column)


def _octets(table: pa.Table, name: str) -> pa.LargeBinaryArray | None:
    """The texts of a column, whatever their bytes; None where there is none, or one of another type."""
    if name not in table.column_names:
        return None
    column = table.column(name).combine_chunks()
    if pa.types.is_string(column.type):
        return column.view(pa.binary()).cast(pa.large_binary())
    return column.view(pa.large_binary()) if pa.types.is_large_string(column.type) else None
