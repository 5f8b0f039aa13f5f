"""Lines of JSON: byte ranges of a file, each read where it is needed."""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from hrm_megatron.data.example import BadRow, RowFormat, parse_object
from hrm_megatron.data.readers.piece import Piece, Row
from hrm_megatron.data.text_files import without_mark


class Cut(NamedTuple):
    """Whole lines, the first of which is `first_line` (from 1), or one line that is too long, by its length."""

    first_line: int
    start_byte: int
    num_bytes: int
    text: bytes
    long_line_bytes: int = 0


@dataclass(frozen=True)
class LinesPiece(Piece):
    """Lines of a jsonl file, or one that is too long to be read, by its length."""

    first_line: int
    start_byte: int
    long_line_bytes: int = 0

    def read(self, rows: RowFormat) -> Iterator[tuple[str, Row | BadRow]]:
        if self.long_line_bytes:
            yield _too_long(f"{self.path}:{self.first_line}", self.long_line_bytes, rows)
            return
        with open(self.path, "rb") as file:
            file.seek(self.start_byte)
            text = file.read(self.num_bytes)
        for number, line in enumerate(text.split(b"\n"), self.first_line):
            place = f"{self.path}:{number}"
            if len(line) > rows.max_line_bytes:
                yield _too_long(place, len(line), rows)
            elif line := without_mark(line):
                try:
                    yield place, parse_object(line, place)
                except BadRow as error:
                    yield place, error


def _too_long(place: str, num_bytes: int, rows: RowFormat) -> tuple[str, BadRow]:
    return place, BadRow("row too long", f"{place}: a line of {num_bytes:,} bytes, --max-characters "
                         f"{rows.max_characters} reads at most {rows.max_line_bytes:,}; split it or raise that")


def blocks_of(file: BinaryIO, num_bytes: int) -> Iterator[bytes]:
    while block := file.read(num_bytes):
        yield block


def cut_lines(blocks: Iterable[bytes], max_line_bytes: int) -> Iterator[Cut]:
    """Cut a stream at line ends, about once a block. Of a line that is too long nothing is kept but its length."""
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


def jsonl_pieces(path: Path, chunk_bytes: int, max_line_bytes: int) -> Iterator[LinesPiece]:
    with open(path, "rb") as file:
        for cut in cut_lines(blocks_of(file, chunk_bytes), max_line_bytes):
            yield LinesPiece(path, cut.num_bytes, cut.first_line, cut.start_byte, cut.long_line_bytes)
