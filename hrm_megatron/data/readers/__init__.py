"""Rows of every kind of input file, read in pieces that workers can take, in bounded memory."""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from hrm_megatron.data.example import BadRow, BadRows, Example, RowFormat, examples_of
from hrm_megatron.data.readers.lines import jsonl_pieces
from hrm_megatron.data.readers.piece import Piece

__all__ = ["PIECE_BYTES", "Piece", "pieces", "read_examples", "read_piece"]

PIECE_BYTES = 1 << 20  # of text, the work of one task
ROWS = RowFormat()


def pieces(path: Path, chunk_bytes: int = PIECE_BYTES, rows: RowFormat = ROWS) -> Iterator[Piece]:
    """Cut a file into pieces of about `chunk_bytes` of text, in its order."""
    return jsonl_pieces(path, chunk_bytes, rows.max_line_bytes)


def read_piece(piece: Piece, rows: RowFormat = ROWS,
               noted: Counter[str] | None = None) -> Iterator[tuple[str, Example | BadRow]]:
    """Yield (place, example or why there is none) in the order of the rows; a row may give several examples.

    What was handled and should be known is counted in `noted`.
    """
    for place, row in piece.read(rows):
        if isinstance(row, BadRow):
            yield place, row
            continue
        try:
            examples = examples_of(row, place, rows)
        except BadRow as error:
            yield place, error
        else:
            yield from ((place, example) for example in examples)


def read_examples(paths: Iterable[Path], rows: RowFormat = ROWS, bad_rows: BadRows | None = None,
                  noted: Counter[str] | None = None) -> Iterator[tuple[str, Example]]:
    """Yield (place, example) of all files; bad rows go to `bad_rows`, else the first is raised."""
    bad_rows = bad_rows or BadRows()
    for path in paths:
        for piece in pieces(path, rows=rows):
            for place, example in read_piece(piece, rows, noted):
                if isinstance(example, BadRow):
                    bad_rows.take(example)
                else:
                    yield place, example
