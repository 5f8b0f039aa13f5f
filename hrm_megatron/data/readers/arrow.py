"""Arrow files and streams, batch by batch: IPC files, Feather, and what the `datasets` library saves."""
from __future__ import annotations

import mmap
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pyarrow as pa

from hrm_megatron.config import ConfigError
from hrm_megatron.data.example import RowFormat
from hrm_megatron.data.readers.columns import ColumnsPiece, Group, column_pieces, columns_of, damage_named

FILE_MARK = b"ARROW1"
STREAM_MARK = b"\xff\xff\xff\xff"
STREAM_END = STREAM_MARK + b"\0\0\0\0"


def arrow_pieces(path: Path, chunk_bytes: int, rows: RowFormat) -> Iterator[ColumnsPiece]:
    mapped = _mapped(path)
    with damage_named(path, "its schema"):
        schema = _schema(mapped)
        columns = columns_of(path, schema, rows)
        options = pa.ipc.IpcReadOptions(use_threads=False, included_fields=[schema.names.index(c) for c in columns])
    groups = (_file_groups if mapped[:len(FILE_MARK)] == FILE_MARK else _stream_groups)(path, mapped, options)
    for piece in column_pieces(path, chunk_bytes, rows, groups):
        yield piece
        mapped.madvise(mmap.MADV_DONTNEED)  # else the whole file is in memory once it was read


def arrow_is_blank(path: Path) -> bool:
    mapped = _mapped(path)
    if mapped[:len(FILE_MARK)] == FILE_MARK:
        with damage_named(path, "its footer"):
            return bool(pa.ipc.open_file(pa.py_buffer(mapped)).num_record_batches == 0)
    if mapped[-len(STREAM_END):] != STREAM_END:
        raise ConfigError(f"{path}: an Arrow stream without its end mark, as if cut off; copy or write it again")
    with damage_named(path, "its first batch"):
        return next(iter(pa.ipc.open_stream(pa.py_buffer(mapped))), None) is None


def _mapped(path: Path) -> mmap.mmap:
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _schema(mapped: mmap.mmap) -> pa.Schema:
    buffer = pa.py_buffer(mapped)
    return (pa.ipc.open_file(buffer) if mapped[:len(FILE_MARK)] == FILE_MARK else pa.ipc.open_stream(buffer)).schema


def _file_groups(path: Path, mapped: mmap.mmap, options: pa.ipc.IpcReadOptions) -> Iterator[Group]:
    with damage_named(path, "its footer"):
        reader = pa.ipc.open_file(pa.py_buffer(mapped), options=options)
    for number in range(reader.num_record_batches):
        batches = (reader.get_batch(i) for i in (number,))
        yield Group(f"record batch {number}", len(mapped) // reader.num_record_batches, batches)


def _stream_groups(path: Path, mapped: mmap.mmap, options: pa.ipc.IpcReadOptions) -> Iterator[Group]:
    source = pa.BufferReader(pa.py_buffer(mapped))
    with damage_named(path, "its schema"):
        reader = iter(pa.ipc.open_stream(source, options=options))
    for number in count():
        start = source.tell()
        with damage_named(path, f"record batch {number}"):
            batch = next(reader, None)
        if batch is None:
            return
        yield Group(f"record batch {number}", source.tell() - start, iter([batch]))
