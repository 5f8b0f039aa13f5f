"""Arrow files and streams, batch by batch: IPC files, Feather, and what the `datasets` library saves."""
from __future__ import annotations

import mmap
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pyarrow as pa

from hrm_megatron.config import ConfigError
from hrm_megatron.data.example import RowFormat
from hrm_megatron.data.readers.arrow_bodies import unpacked_bytes
from hrm_megatron.data.readers.columns import ColumnsPiece, Group, column_pieces, columns_of, damage_named

FILE_MARK = b"ARROW1"
STREAM_MARK = b"\xff\xff\xff\xff"
STREAM_END = STREAM_MARK + b"\0\0\0\0"
STREAM_IN_FILE = 8  # offset of the stream inside an IPC file, before the footer
OPTIONS = pa.ipc.IpcReadOptions(use_threads=False)
UNPACKED_BYTES = 1 << 29  # limit for one batch, which is decompressed as a whole


def arrow_pieces(path: Path, chunk_bytes: int, rows: RowFormat) -> Iterator[ColumnsPiece]:
    mapped = _mapped(path)
    is_file = mapped[:len(FILE_MARK)] == FILE_MARK
    _check_sizes(path, mapped, is_file)
    groups = (_file_groups if is_file else _stream_groups)(path, mapped, rows)
    for piece in column_pieces(path, chunk_bytes, rows, groups):
        yield piece
        mapped.madvise(mmap.MADV_DONTNEED)  # else the whole file stays resident once it was read


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


def _check_sizes(path: Path, mapped: mmap.mmap, is_file: bool) -> None:
    """Refuse batches that are too large when decompressed; uncompressed ones are read from the map."""
    stream = pa.py_buffer(mapped)
    sizes = unpacked_bytes(stream.slice(STREAM_IN_FILE) if is_file else stream)
    for number in count():
        with damage_named(path, f"record batch {number}"):
            num_bytes = next(sizes, None)
        if num_bytes is None:
            return
        if num_bytes > UNPACKED_BYTES:
            raise ConfigError(f"{path}: record batch {number} unpacks to {num_bytes:,} bytes, more than "
                              f"{UNPACKED_BYTES:,}; write it with smaller batches or without compression")


# Columns are selected from whole batches: if pyarrow is told which to read, it copies them out of the map.

def _file_groups(path: Path, mapped: mmap.mmap, rows: RowFormat) -> Iterator[Group]:
    with damage_named(path, "its footer"):
        reader = pa.ipc.open_file(pa.py_buffer(mapped), options=OPTIONS)
        columns = columns_of(path, reader.schema, rows)
    for number in range(reader.num_record_batches):
        batches = (reader.get_batch(i).select(columns) for i in (number,))
        yield Group(f"record batch {number}", len(mapped) // reader.num_record_batches, batches)


def _stream_groups(path: Path, mapped: mmap.mmap, rows: RowFormat) -> Iterator[Group]:
    source = pa.BufferReader(pa.py_buffer(mapped))
    with damage_named(path, "its schema"):
        reader = pa.ipc.open_stream(source, options=OPTIONS)
        columns = columns_of(path, reader.schema, rows)
    for number in count():
        start = source.tell()
        with damage_named(path, f"record batch {number}"):
            batch = next(reader, None)
        if batch is None:
            return
        yield Group(f"record batch {number}", source.tell() - start, iter([batch.select(columns)]))
