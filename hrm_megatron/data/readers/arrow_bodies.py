"""The decompressed sizes of the buffers of Arrow messages, read before anything is decompressed.

pyarrow decompresses a record batch as a whole and exposes no sizes. They are the first eight bytes of each compressed
buffer; the offsets of the buffers are in the metadata of the message, a FlatBuffer.
"""
from __future__ import annotations

from collections.abc import Iterator
from struct import error as StructError
from struct import unpack_from

import pyarrow as pa

HEADER_TYPE, HEADER = 1, 2  # field numbers of Message
DICTIONARY_BATCH, RECORD_BATCH = 2, 3  # values of its header union
BUFFERS, COMPRESSION = 2, 3  # field numbers of RecordBatch
DATA = 1  # field number in DictionaryBatch: a RecordBatch


def unpacked_bytes(stream: pa.Buffer) -> Iterator[int]:
    """Yield for each record batch of a stream the decompressed bytes of it and of all dictionaries before it. Raises
    ValueError if metadata is invalid."""
    dictionaries = 0
    for message in pa.ipc.MessageReader.open_stream(stream):
        try:
            kind, num_bytes = _message(message)
        except (StructError, IndexError) as error:
            raise ValueError(f"metadata of a message lead astray ({error})") from error
        if kind == DICTIONARY_BATCH:
            dictionaries += num_bytes
        elif kind == RECORD_BATCH:
            yield dictionaries + num_bytes


def _message(message: pa.ipc.Message) -> tuple[int, int]:
    """Return the kind of a message and its decompressed bytes, 0 if it is not compressed."""
    data = memoryview(message.metadata)
    table = unpack_from("<I", data, 0)[0]
    kind_at, header_at = _field(data, table, HEADER_TYPE), _field(data, table, HEADER)
    if not kind_at or not header_at:
        return 0, 0
    kind, batch = data[kind_at], _target(data, header_at)
    if kind == DICTIONARY_BATCH and (inside := _field(data, batch, DATA)):
        batch = _target(data, inside)
    elif kind != RECORD_BATCH:
        return kind, 0
    buffers_at = _field(data, batch, BUFFERS)
    if not _field(data, batch, COMPRESSION) or not buffers_at:
        return kind, 0
    vector, body = _target(data, buffers_at), memoryview(message.body)
    num_bytes = 0
    for i in range(unpack_from("<I", data, vector)[0]):
        offset, length = unpack_from("<qq", data, vector + 4 + 16 * i)
        if length >= 8:
            num_bytes += max(unpack_from("<q", body, offset)[0], 0)  # -1: not compressed
    return kind, num_bytes


def _target(data: memoryview, at: int) -> int:
    return at + int(unpack_from("<I", data, at)[0])


def _field(data: memoryview, table: int, number: int) -> int:
    """Return the offset of a field of a FlatBuffer table, 0 if it is absent."""
    vtable = table - unpack_from("<i", data, table)[0]
    if vtable < 0:
        raise IndexError("a table before the beginning")
    entry = 4 + 2 * number
    if entry + 2 > unpack_from("<H", data, vtable)[0]:
        return 0
    offset = unpack_from("<H", data, vtable + entry)[0]
    return table + offset if offset else 0
