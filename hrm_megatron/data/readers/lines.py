"""Lines of JSON: byte ranges of a file that workers read themselves, or decompressed text of a compressed file."""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from hrm_megatron.data.example import BadRow, RowFormat, parse_object
from hrm_megatron.data.example_batch import ExampleBatch
from hrm_megatron.data.readers.piece import Piece, Row, too_long
from hrm_megatron.data.readers.plain_rows import plain_rows
from hrm_megatron.data.readers.streams import open_stream
from hrm_megatron.data.text_files import HEAD_BYTES, is_blank_jsonl, without_mark


class Cut(NamedTuple):
    """Whole lines, the first numbered `first_line` (from 1); of a single line that is too long, only its length."""

    first_line: int
    start_byte: int
    num_bytes: int
    text: bytes
    long_line_bytes: int = 0


@dataclass(frozen=True)
class LinesPiece(Piece):
    """Lines of jsonl; of a line that is too long, only its length. Without `text` they are read from the file."""

    first_line: int
    start_byte: int
    text: bytes | None = None
    long_line_bytes: int = 0

    def read(self, rows: RowFormat) -> Iterator[tuple[str, Row | BadRow]]:
        if self.long_line_bytes:
            yield too_long(f"{self.path}:{self.first_line}", self.long_line_bytes, rows)
            return
        file_name = str(self.path)
        for number, line in enumerate(self._lines().split(b"\n"), self.first_line):
            place = f"{file_name}:{number}"
            if len(line) > rows.max_row_bytes:
                yield too_long(place, len(line), rows)
            elif line := without_mark(line):
                try:
                    yield place, parse_object(line, place)
                except BadRow as error:
                    yield place, error

    def read_columns(self, rows: RowFormat) -> ExampleBatch | None:
        return None if self.long_line_bytes else plain_rows(self._lines(), str(self.path), self.first_line, rows)

    def _lines(self) -> bytes:
        if self.text is not None:
            return self.text
        with open(self.path, "rb") as file:
            file.seek(self.start_byte)
            return file.read(self.num_bytes)


def cut_lines(blocks: Iterable[bytes], max_line_bytes: int) -> Iterator[Cut]:
    """Cut a stream at line ends, about once per block. Of a line that is too long only the length is kept."""
    line, start, skipped = 1, 0, 0
    rest = bytearray()
    for block in blocks:
        if skipped:
            head, newline, block = block.partition(b"\n")
            skipped += len(head) + len(newline)
            if not newline:
                continue
            yield Cut(line, start, skipped, b"", skipped - 1)
            line, start, skipped = line + 1, start + skipped, 0
        rest += block
        if end := rest.rfind(b"\n") + 1:
            yield Cut(line, start, end, bytes(rest[:end]))
            line, start = line + rest.count(b"\n", 0, end), start + end
            del rest[:end]
        if len(rest) > max_line_bytes:
            skipped = len(rest)
            rest.clear()
    if skipped:
        yield Cut(line, start, skipped, b"", skipped)
    elif rest:
        yield Cut(line, start, len(rest), bytes(rest))


def jsonl_pieces(path: Path, chunk_bytes: int, rows: RowFormat) -> Iterator[LinesPiece]:
    with open_stream(path) as stream:
        done = 0
        for cut in cut_lines(stream.blocks(chunk_bytes), rows.max_row_bytes):
            packed = stream.packed_bytes
            num_bytes, text = (packed - done, cut.text) if stream.codec else (cut.num_bytes, None)
            done = packed
            yield LinesPiece(path, num_bytes, cut.first_line, cut.start_byte, text, cut.long_line_bytes)


def jsonl_is_blank(path: Path) -> bool:
    """Return whether a jsonl file, compressed or not, has no row; refuse other kinds of files, naming the kind."""
    with open_stream(path) as stream:
        blocks = stream.blocks(HEAD_BYTES)
        head = next(blocks, b"")
        return is_blank_jsonl(path, head, whole=next(blocks, None) is None)
