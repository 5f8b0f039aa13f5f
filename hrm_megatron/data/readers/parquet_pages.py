"""Page headers of a Parquet column, which give the memory that a page takes before it is decompressed.

A page is the smallest unit in which a column can be read. pyarrow reads page headers (Thrift compact protocol) together
with the data and exposes neither.
"""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple

import pyarrow.parquet as pq

HEADER_BYTES = 1 << 12  # usually some 30; statistics in a header may hold whole texts
LONGEST_HEADER_BYTES = 1 << 26
DICTIONARY_PAGE = 2
UNCOMPRESSED_SIZE, COMPRESSED_SIZE = 2, 3  # field numbers of PageHeader
DATA_HEADERS = (5, 8)  # of versions 1 and 2; field 1 of either is the number of values


class Page(NamedTuple):
    num_bytes: int
    num_values: int
    is_dictionary: bool


def pages(file: BinaryIO, column: pq.ColumnChunkMetaData) -> Iterator[Page]:
    """Yield the pages of a column chunk. Raises ValueError at an invalid header."""
    has_dictionary = column.has_dictionary_page and 0 < column.dictionary_page_offset < column.data_page_offset
    place = column.dictionary_page_offset if has_dictionary else column.data_page_offset
    left = column.num_values
    while left > 0:
        header, header_bytes = _header(file, place)
        data: dict[int, Any] = next((header[key] for key in DATA_HEADERS if key in header), {})
        if not isinstance(data, dict) or type(data.get(1, 0)) is not int:
            raise ValueError(f"no page header at byte {place}")
        page = Page(header[UNCOMPRESSED_SIZE], data.get(1, 0), header[1] == DICTIONARY_PAGE)
        if header[COMPRESSED_SIZE] < 0 or page.num_bytes < 0 or (data and page.num_values < 0):
            raise ValueError(f"a page of negative size at byte {place}")
        yield page
        left -= page.num_values
        place += header_bytes + header[COMPRESSED_SIZE]


def _header(file: BinaryIO, place: int) -> tuple[dict[int, Any], int]:
    """Read a PageHeader; return its fields and its length in bytes."""
    num_bytes = HEADER_BYTES
    while True:
        file.seek(place)
        data = file.read(num_bytes)
        try:
            header, end = _struct(data, 0)
        except IndexError as error:
            if len(data) < num_bytes or num_bytes >= LONGEST_HEADER_BYTES:
                raise ValueError(f"no page header at byte {place}") from error
            num_bytes *= 8
            continue
        if any(type(header.get(key)) is not int for key in (1, UNCOMPRESSED_SIZE, COMPRESSED_SIZE)):
            raise ValueError(f"no page header at byte {place}")
        return header, end


def _struct(data: bytes, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    """Parse a struct into its fields by number; binary fields are skipped. Raises IndexError if the bytes end early."""
    fields: dict[int, Any] = {}
    number = 0
    while (head := data[at]) != 0:
        at += 1
        if head >> 4:
            number += head >> 4
        else:
            number, at = _integer(data, at)
        fields[number], at = _value(data, at, head & 15, depth)
    return fields, at + 1


def _value(data: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    if kind in (1, 2):  # true and false are encoded in the type
        return kind == 1, at
    if kind == 3:
        return data[at], at + 1
    if kind in (4, 5, 6):
        return _integer(data, at)
    if kind == 8:
        length, at = _varint(data, at)
        return None, at + length
    if kind == 12 and depth < 4:
        return _struct(data, at, depth + 1)
    raise ValueError(f"no page header: type {kind} in it")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
        if shift > 63:
            raise ValueError("no page header: an integer without end")


def _integer(data: bytes, at: int) -> tuple[int, int]:
    """Decode a zigzag integer: the sign is the lowest bit."""
    value, at = _varint(data, at)
    return (value >> 1) ^ -(value & 1), at
