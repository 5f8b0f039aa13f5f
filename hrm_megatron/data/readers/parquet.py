"""Parquet files, row group by row group."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hrm_megatron.data.example import RowFormat
from hrm_megatron.data.readers.columns import ColumnsPiece, Group, column_pieces, columns_of, damage_named

MARK = b"PAR1"
BATCH_ROWS = 1024
BUFFER_BYTES = 1 << 20  # of a column chunk; without it, each is read as a whole


def parquet_pieces(path: Path, chunk_bytes: int, rows: RowFormat) -> Iterator[ColumnsPiece]:
    with _opened(path) as file:
        columns = columns_of(path, file.schema_arrow, rows)
        yield from column_pieces(path, chunk_bytes, rows, _groups(file, columns))


def parquet_is_blank(path: Path) -> bool:
    with _opened(path) as file:
        return bool(file.metadata.num_rows == 0)


def _opened(path: Path) -> pq.ParquetFile:
    with damage_named(path, "its footer"):
        return pq.ParquetFile(path, buffer_size=BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True)


def _groups(file: pq.ParquetFile, columns: list[str]) -> Iterator[Group]:
    for number in range(file.num_row_groups):
        group = file.metadata.row_group(number)
        num_bytes = sum(group.column(i).total_compressed_size for i in range(group.num_columns))
        yield Group(f"row group {number}", num_bytes, _batches(file, number, columns))


def _batches(file: pq.ParquetFile, number: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
    yield from file.iter_batches(BATCH_ROWS, row_groups=[number], columns=columns)
