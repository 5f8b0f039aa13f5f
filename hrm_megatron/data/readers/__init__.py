"""Read rows of every kind of input file, in pieces that can be sent to workers, in bounded memory."""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from hrm_megatron.config import ConfigError
from hrm_megatron.data.example import BadRow, BadRows, Example, RowFormat
from hrm_megatron.data.example_batch import ExampleBatch, batches
from hrm_megatron.data.raw_text import BY_CHARACTERS, Sizes
from hrm_megatron.data.readers.arrow import FILE_MARK, STREAM_MARK, arrow_is_blank, arrow_pieces
from hrm_megatron.data.readers.documents import document_is_blank, document_pieces, is_document
from hrm_megatron.data.readers.lines import jsonl_is_blank, jsonl_pieces
from hrm_megatron.data.readers.parquet import MARK, parquet_is_blank, parquet_pieces
from hrm_megatron.data.readers.piece import Piece
from hrm_megatron.data.row_shapes import examples_of, shape_of

__all__ = ["PIECE_BYTES", "Piece", "is_blank", "pieces", "read_batches", "read_examples", "read_piece",
           "sample_documents", "with_shape"]

PIECE_BYTES = 1 << 20  # of text: the work of one task
ROWS = RowFormat()


class Kind(NamedTuple):
    """A kind of file, identified by its magic bytes."""

    mark: bytes
    pieces: Callable[[Path, int, RowFormat], Iterator[Piece]]
    is_blank: Callable[[Path], bool]


KINDS = (
    Kind(MARK, parquet_pieces, parquet_is_blank),
    Kind(FILE_MARK, arrow_pieces, arrow_is_blank),
    Kind(STREAM_MARK, arrow_pieces, arrow_is_blank),
    Kind(b"", jsonl_pieces, jsonl_is_blank),  # compressed or not
)
DOCUMENT = Kind(b"", document_pieces, document_is_blank)  # identified by its name, and only if documents are wanted
NEVER_EMPTY = (".parquet", ".arrow", ".feather", ".gz", ".zst")


def _kind(path: Path, documents: bool) -> Kind:
    with open(path, "rb") as file:
        head = file.read(max(len(kind.mark) for kind in KINDS))
    if not head and path.suffix in NEVER_EMPTY:
        raise ConfigError(f"{path}: empty, which no {path.suffix} file is; copy or write it again")
    if documents and is_document(path):
        return DOCUMENT
    return next(kind for kind in KINDS if head.startswith(kind.mark))


def is_blank(path: Path, documents: bool = False) -> bool:
    """Return whether a file has no row; refuse a file of a kind that cannot be read, naming the kind."""
    return _kind(path, documents).is_blank(path)


def pieces(path: Path, chunk_bytes: int = PIECE_BYTES, rows: RowFormat = ROWS, readers: int = 1) -> Iterator[Piece]:
    """Cut a file into pieces of about `chunk_bytes` of text, in order. Of Parquet, `readers` row groups are read
    concurrently, each with the memory that one needs."""
    kind = _kind(path, rows.raw is not None)
    if kind.mark == MARK:
        return parquet_pieces(path, chunk_bytes, rows, readers)
    return kind.pieces(path, chunk_bytes, rows)


def read_piece(piece: Piece, rows: RowFormat = ROWS,
               noted: Counter[str] | None = None,
               sizes: Sizes = BY_CHARACTERS) -> Iterator[tuple[str, Example | BadRow]]:
    """Yield (place, example or bad row) in the order of the rows; a row may give several examples.

    Events that should be reported are counted in `noted`; documents are cut by `sizes`.
    """
    for place, row in piece.read(rows):
        if isinstance(row, BadRow):
            yield place, row
            continue
        try:
            examples = examples_of(row, place, rows, noted, sizes)
        except BadRow as error:
            yield place, error
        else:
            yield from ((place, example) for example in examples)


def read_batches(piece: Piece, rows: RowFormat, noted: Counter[str], sizes: Sizes) -> Iterator[ExampleBatch]:
    """Yield the result of `read_piece` in columnar form: all rows at once if possible, else row by row."""
    if batch := piece.read_columns(rows):
        yield batch
    else:
        yield from batches(read_piece(piece, rows, noted, sizes))


def read_examples(paths: Iterable[Path], rows: RowFormat = ROWS, bad_rows: BadRows | None = None,
                  noted: Counter[str] | None = None) -> Iterator[tuple[str, Example]]:
    """Yield (place, example) of all files; bad rows go to `bad_rows`; without it the first is raised."""
    bad_rows = bad_rows or BadRows()
    for path in paths:
        for piece in pieces(path, rows=rows):
            for place, example in read_piece(piece, rows, noted):
                if isinstance(example, BadRow):
                    bad_rows.take(example)
                else:
                    yield place, example


def with_shape(rows: RowFormat, paths: Sequence[Path]) -> tuple[RowFormat, str | None]:
    """Detect the shape from the first row that has one, and return where that row is; None if there is none.

    In each file only pieces up to the first readable one are searched.
    """
    rows = replace(rows, shape=ROWS.shape)
    for path in paths:
        for piece in pieces(path, rows=rows):
            readable = False
            for place, row in piece.read(rows):
                if isinstance(row, BadRow):
                    continue
                if shape := shape_of(row, rows):
                    return replace(rows, shape=shape), place
                readable = True
            if readable:
                break
    return rows, None


def sample_documents(paths: Sequence[Path], rows: RowFormat, characters: int) -> Iterator[str]:
    """Yield the first documents of every file, about the same amount of each, up to `characters` in total."""
    assert rows.raw
    for path in paths:
        left = max(1, characters // len(paths))
        for piece in pieces(path, rows=rows):
            for _, row in piece.read(rows):
                text = "" if isinstance(row, BadRow) else row.get(rows.raw.key)
                if isinstance(text, str) and left > 0:
                    yield text[:left]
                    left -= len(text)
            if left <= 0:
                break
