"""Plain text files, one document each."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hrm_megatron.config import ConfigError
from hrm_megatron.data.example import BadRow, RowFormat
from hrm_megatron.data.readers.piece import Piece, Row, too_long
from hrm_megatron.data.readers.streams import open_stream
from hrm_megatron.data.text_files import decode

SUFFIXES = tuple(name + packed for name in (".txt", ".md") for packed in ("", ".gz", ".zst"))


@dataclass(frozen=True)
class DocumentPiece(Piece):
    """A whole file; of a file that is too long, only its length."""

    text: bytes
    long_bytes: int = 0

    def read(self, rows: RowFormat) -> Iterator[tuple[str, Row | BadRow]]:
        assert rows.raw
        place = str(self.path)
        if self.long_bytes:
            yield too_long(place, self.long_bytes, rows)
            return
        try:
            yield place, {rows.raw.key: decode(self.text, place)}
        except ConfigError as error:
            yield place, BadRow("not UTF-8", str(error))


def is_document(path: Path) -> bool:
    return path.name.endswith(SUFFIXES)


def document_pieces(path: Path, chunk_bytes: int, rows: RowFormat) -> Iterator[DocumentPiece]:
    text, num_bytes = bytearray(), 0
    with open_stream(path) as stream:
        for block in stream.blocks(chunk_bytes):
            num_bytes += len(block)
            if num_bytes <= rows.max_row_bytes:
                text += block
    long_bytes = num_bytes if num_bytes > rows.max_row_bytes else 0
    yield DocumentPiece(path, path.stat().st_size, b"" if long_bytes else bytes(text), long_bytes)


def document_is_blank(path: Path) -> bool:
    with open_stream(path) as stream:
        return not next(stream.blocks(1), b"")
