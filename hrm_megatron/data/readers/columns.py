"""Column batches of Parquet and Arrow files, as pieces that carry their rows."""
from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from hrm_megatron.config import ConfigError
from hrm_megatron.data.example import BadRow, RowFormat
from hrm_megatron.data.example_batch import ExampleBatch
from hrm_megatron.data.readers.column_values import Checks, check_slice, num_bytes, plain
from hrm_megatron.data.readers.piece import Piece, Row, too_long
from hrm_megatron.data.readers.plain_columns import plain_columns
from hrm_megatron.data.row_shapes import fields_to_read
from hrm_megatron.data.text_files import convert_from

DAMAGE = (pa.ArrowException, OSError, OverflowError, ValueError)  # what pyarrow raises over damaged bytes
SLICE_ROWS = 1024  # of a batch, processed together; a memory-mapped batch may be the whole file


class Group(NamedTuple):
    """A unit of rows in a file; `name` is what the file's own library calls it: `row group 3`."""

    name: str
    num_bytes: int
    batches: Iterator[pa.RecordBatch]


class Part(NamedTuple):
    """Rows of a group as an Arrow stream; of a single row that is too long, only its size."""

    num_rows: int
    batches: bytes
    long_row_bytes: int = 0


@dataclass(frozen=True)
class ColumnsPiece(Piece):
    """Rows of a group from `first_row` on; rows are counted from 0 in each group, as in pyarrow."""

    group: str
    first_row: int
    part: Part

    def read(self, rows: RowFormat) -> Iterator[tuple[str, Row | BadRow]]:
        number = self.first_row
        if self.part.long_row_bytes:
            yield too_long(self._place(number), self.part.long_row_bytes, rows)
            return
        for batch in pa.ipc.open_stream(self.part.batches):
            for row in _rows(batch):
                place = self._place(number)
                yield place, row if isinstance(row, dict) else _not_utf8(place, row)
                number += 1

    def read_columns(self, rows: RowFormat) -> ExampleBatch | None:
        if self.part.long_row_bytes:
            return None
        table = pa.ipc.open_stream(self.part.batches).read_all()
        return plain_columns(table, lambda i: self._place(self.first_row + i), rows)

    def _place(self, number: int) -> str:
        return f"{self.path}:{self.group}, row {number}"


def _rows(batch: pa.RecordBatch) -> Iterator[Row | UnicodeDecodeError]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for i in range(batch.num_rows):
            try:
                yield batch.slice(i, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield error


def _not_utf8(place: str, error: UnicodeDecodeError) -> BadRow:
    return BadRow("not UTF-8", f"{place}: not UTF-8 ({error.reason} at byte {error.start} of a text); correct the row, "
                               f"or if the texts are of another encoding, {convert_from('LATIN1')}")


@contextlib.contextmanager
def damage_named(path: Path, what: str) -> Iterator[None]:
    """Turn the errors of pyarrow over damaged bytes into one line that names file and group."""
    try:
        yield
    except ConfigError:  # our own, which is a ValueError too
        raise
    except DAMAGE as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: {what} cannot be read ({reason}); copy or write it again") from error


def columns_of(path: Path, schema: pa.Schema, rows: RowFormat) -> list[str]:
    """Return the columns to read; all if a needed one is missing, so that messages can list those that exist."""
    if twice := sorted({name for name in schema.names if schema.names.count(name) > 1}):
        raise ConfigError(f"{path}: two columns {twice[0]!r}; rename one")
    return fields_to_read(schema.names, rows)


def column_pieces(path: Path, chunk_bytes: int, rows: RowFormat, groups: Iterable[Group]) -> Iterator[ColumnsPiece]:
    """Cut groups into pieces of about `chunk_bytes`. Damage is a ConfigError that names file and group."""
    checks = Checks()
    for group in groups:
        first = done = 0
        parts = _parts(_slices(group.batches, chunk_bytes, checks), chunk_bytes, rows.max_row_bytes)
        while True:
            with damage_named(path, group.name):
                part = next(parts, None)
            if part is None:
                break
            yield ColumnsPiece(path, group.num_bytes - done, group.name, first, part)
            first, done = first + part.num_rows, group.num_bytes


def _parts(slices: Iterable[pa.RecordBatch], chunk_bytes: int, max_row_bytes: int) -> Iterator[Part]:
    waiting: list[pa.RecordBatch] = []
    waiting_bytes = 0
    for batch in slices:
        batch_bytes = sum(map(num_bytes, batch.columns))
        long = batch.num_rows == 1 and batch_bytes > max_row_bytes
        if waiting and (long or waiting_bytes + batch_bytes > chunk_bytes):
            yield _part(waiting)
            waiting, waiting_bytes = [], 0
        if long:
            yield Part(1, b"", batch_bytes)
        else:
            waiting.append(batch)
            waiting_bytes += batch_bytes
    if waiting:
        yield _part(waiting)


def _part(batches: Sequence[pa.RecordBatch]) -> Part:
    rows = [pa.RecordBatch.from_arrays(list(map(plain, batch.columns)), batch.schema.names) for batch in batches]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows[0].schema) as writer:
        for batch in rows:
            writer.write_batch(batch)
    return Part(sum(batch.num_rows for batch in batches), sink.getvalue().to_pybytes())


def _slices(batches: Iterable[pa.RecordBatch], chunk_bytes: int, checks: Checks) -> Iterator[pa.RecordBatch]:
    """Split batches until each has at most `chunk_bytes` or one row. Invalid offsets raise ArrowException."""
    for batch in batches:
        sound = checks.checked(batch)
        for start in range(0, batch.num_rows, SLICE_ROWS):
            part = sound.slice(start, SLICE_ROWS)
            check_slice(part)
            yield from _halves(part, chunk_bytes)


def _halves(batch: pa.RecordBatch, chunk_bytes: int) -> Iterator[pa.RecordBatch]:
    if batch.num_rows < 2 or sum(map(num_bytes, batch.columns)) <= chunk_bytes:
        yield batch
        return
    middle = batch.num_rows // 2
    yield from _halves(batch.slice(0, middle), chunk_bytes)
    yield from _halves(batch.slice(middle), chunk_bytes)
