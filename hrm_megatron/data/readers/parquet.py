"""Parquet files, row group by row group."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hrm_megatron.data.example import RowFormat
from hrm_megatron.data.readers.ahead import read_ahead
from hrm_megatron.data.readers.columns import ColumnsPiece, Group, column_pieces, columns_of, damage_named
from hrm_megatron.data.readers.parquet_pages import pages

MARK = b"PAR1"
BATCH_ROWS = 1024
DICTIONARY_BATCH_ROWS = 1 << 16  # if a column stays a dictionary: every batch copies it
BATCH_BYTES = 1 << 24  # of a batch, by the average row size of the group
EXPANDED_BYTES = 1 << 28  # of a batch, if every row were as long as a dictionary or a page allows
PAGE_BYTES = 1 << 27  # pages usually have 1 MB, DuckDB's up to 100 MB
PAGE_VALUES = 1 << 24
BUFFER_BYTES = 1 << 20  # read buffer per column chunk; without it, each chunk is read as a whole


def parquet_pieces(path: Path, chunk_bytes: int, rows: RowFormat, readers: int = 1) -> Iterator[ColumnsPiece]:
    """Cut a file into pieces; `readers` row groups are read concurrently, which does not change the pieces."""
    with _opened(path) as file:
        metadata, columns = file.metadata, columns_of(path, file.schema_arrow, rows)

    def group_pieces(number: int) -> Iterator[ColumnsPiece]:
        with _opened(path, metadata) as file:
            yield from column_pieces(path, chunk_bytes, rows, [_group(path, file, number, columns)])

    yield from read_ahead(map(group_pieces, range(metadata.num_row_groups)), readers)


def parquet_is_blank(path: Path) -> bool:
    with _opened(path) as file:
        return bool(file.metadata.num_rows == 0)


def _opened(path: Path, metadata: pq.FileMetaData | None = None) -> pq.ParquetFile:
    with damage_named(path, "its footer"):
        return pq.ParquetFile(path, metadata=metadata, buffer_size=BUFFER_BYTES, pre_buffer=False,
                              page_checksum_verification=True)


def _group(path: Path, file: pq.ParquetFile, number: int, columns: list[str]) -> Group:
    group = file.metadata.row_group(number)
    num_bytes = sum(group.column(i).total_compressed_size for i in range(group.num_columns))
    return Group(f"row group {number}", num_bytes, _batches(path, file, number, columns))


def _batches(path: Path, file: pq.ParquetFile, number: int, columns: list[str]) -> Iterator[pa.RecordBatch]:
    dictionaries = {field.name for field in file.schema_arrow if pa.types.is_dictionary(field.type)}
    batch_rows = _batch_rows(path, file.metadata.row_group(number), columns, dictionaries)
    yield from file.iter_batches(batch_rows, row_groups=[number], columns=columns)


def _batch_rows(path: Path, group: pq.RowGroupMetaData, columns: list[str], dictionaries: set[str]) -> int:
    """Return the number of rows per batch such that a batch fits in memory however strongly it is compressed, and such
    that `dictionaries`, the columns that stay dictionary-encoded, are not copied too often. Raises ArrowInvalid if no
    batch fits."""
    rows = DICTIONARY_BATCH_ROWS if dictionaries.intersection(columns) else BATCH_ROWS
    with open(path, "rb") as file:
        for column in map(group.column, range(group.num_columns)):
            name = column.path_in_schema.split(".")[0]
            if not group.num_rows or name not in columns:
                continue
            rows = min(rows, BATCH_BYTES * group.num_rows // max(1, column.total_uncompressed_size))
            values_per_row = -(-column.num_values // group.num_rows)
            for page in pages(file, column):
                if page.num_bytes > PAGE_BYTES or max(page.num_values, values_per_row) > PAGE_VALUES:
                    raise pa.ArrowInvalid(
                        f"{column.path_in_schema} has a page of {page.num_bytes:,} bytes, {page.num_values:,} values, "
                        f"more than {PAGE_BYTES:,} or {PAGE_VALUES:,}: leave out rows that long, or use smaller pages")
                expanded = (page.is_dictionary and name not in dictionaries) or "DELTA_BYTE_ARRAY" in column.encodings
                if expanded:
                    rows = min(rows, EXPANDED_BYTES // max(1, page.num_bytes * values_per_row))
    return max(1, rows)
