"""Arrow column values: their size in bytes, validation of offsets and indices, and conversion to plain layouts.

Dictionaries and the buffers of view types store a text once, however often it is used, and every slice refers to all of
them.
"""
from __future__ import annotations

from functools import lru_cache

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

VIEWS = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}  # view type -> equivalent plain type
AS_BYTES = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}
SHORT_OFFSETS, LONG_OFFSETS = (pa.string(), pa.binary()), (pa.large_string(), pa.large_binary())
VIEW_INTEGERS = 4  # 32-bit integers per view; the first is the length


def num_bytes(column: pa.Array) -> int:
    """Return the bytes of a column's values, counting a shared text once per use."""
    if _is_plain(column.type):
        return int(column.nbytes)
    if pa.types.is_dictionary(column.type):
        return _bytes_at(column.dictionary, column.indices.drop_null().to_numpy(zero_copy_only=False))
    if column.type in VIEWS:
        return _bytes_at(column, np.flatnonzero(column.is_valid().to_numpy(zero_copy_only=False)))
    return sum(map(num_bytes, _children(column)))


def _bytes_at(values: pa.Array, at: np.ndarray) -> int:
    """Return the bytes of the values at these indices, counting repetitions."""
    if not len(at):
        return 0
    if values.type in VIEWS:
        lengths = np.frombuffer(values.buffers()[1], np.int32)[::VIEW_INTEGERS][values.offset:]
        return int(lengths[at].sum(dtype=np.int64))
    if values.type not in SHORT_OFFSETS + LONG_OFFSETS:
        return int(values.take(pa.array(at)).nbytes)
    offsets = np.frombuffer(values.buffers()[1], np.int32 if values.type in SHORT_OFFSETS else np.int64)[values.offset:]
    return int((offsets[at + 1].astype(np.int64) - offsets[at]).sum())


def _children(column: pa.Array) -> list[pa.Array]:
    """Return the child values of a nested column, restricted to its own rows."""
    flat = column.flatten()
    return flat if pa.types.is_struct(column.type) else [flat]


def plain(column: pa.Array) -> pa.Array:
    """Return the same values in a plain contiguous layout, without those of other rows."""
    if _is_plain(column.type):
        return column
    if pa.types.is_dictionary(column.type):
        return column.dictionary_decode()
    if column.type in VIEWS:
        return column.cast(VIEWS[column.type])
    inner = list(map(plain, _children(column)))
    if pa.types.is_struct(column.type):
        return pa.StructArray.from_arrays(inner, [field.name for field in column.type], mask=column.is_null())
    lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)  # a cast would copy all rows' values
    return pa.LargeListArray.from_arrays(np.append(0, lengths.cumsum()), *inner, mask=column.is_null())


@lru_cache
def _is_plain(kind: pa.DataType) -> bool:
    """Return whether a type contains neither dictionaries nor views."""
    inner = ([field.type for field in kind] if pa.types.is_struct(kind) else
             [kind.value_type] if pa.types.is_list(kind) or pa.types.is_large_list(kind) else [])
    return not pa.types.is_dictionary(kind) and kind not in VIEWS and all(map(_is_plain, inner))


def _as_bytes(kind: pa.DataType) -> pa.DataType:
    """Return the type of the same layout with binary in place of text."""
    if kind in AS_BYTES:
        return AS_BYTES[kind]
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_as_bytes(kind.value_type)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_as_bytes(kind.value_type)))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_as_bytes(field.type)) for field in kind])
    return kind


class Checks:
    """Validate offsets and indices against the values that they refer to. Raises ArrowException if they are invalid.

    UTF-8 is not validated here but row by row. The dictionary of a column is checked once, however many batches share
    it.
    """

    def __init__(self) -> None:
        self._seen: dict[int, tuple[pa.Array, pa.Array]] = {}  # by column number: the dictionary, and its plain form

    def checked(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Return a batch with validated dictionaries and nested columns; the rest is validated by `check_slice`."""
        batch.validate()
        columns = []
        for number, column in enumerate(batch.columns):
            if pa.types.is_dictionary(column.type):
                column = pa.DictionaryArray.from_arrays(column.indices, self._dictionary(number, column.dictionary),
                                                        safe=False)
            elif pa.types.is_nested(column.type):
                _check(column)
            columns.append(column)
        return pa.RecordBatch.from_arrays(columns, batch.schema.names)

    def _dictionary(self, number: int, found: pa.Array) -> pa.Array:
        seen = self._seen.get(number)
        if seen is None or _places(seen[0]) != _places(found):  # kept alive, so its addresses are not reused
            _check(found)
            self._seen[number] = seen = found, plain(found)
        return seen[1]


def check_slice(batch: pa.RecordBatch) -> None:
    """Validate rows of a `checked` batch."""
    for column in batch.columns:
        if pa.types.is_dictionary(column.type):
            ends = pc.min_max(column.indices).as_py()
            if ends["min"] is not None and not 0 <= ends["min"] <= ends["max"] < len(column.dictionary):
                raise pa.ArrowInvalid(f"no value {ends['max'] if ends['min'] >= 0 else ends['min']} in a dictionary "
                                      f"of {len(column.dictionary)}")
        elif not pa.types.is_nested(column.type):
            _check(column)


def _check(column: pa.Array) -> None:
    column.view(_as_bytes(column.type)).validate(full=True)


def _places(values: pa.Array) -> tuple[int, int, list[int]]:
    return values.offset, len(values), [buffer.address if buffer else 0 for buffer in values.buffers()]
