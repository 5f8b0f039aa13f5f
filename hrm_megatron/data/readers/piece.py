"""A piece of an input file, of any kind."""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hrm_megatron.data.example import BadRow, RowFormat
from hrm_megatron.data.example_batch import ExampleBatch

Row = dict[str, Any]


@dataclass(frozen=True)
class Piece(ABC):
    """Consecutive rows of a file, picklable for workers. `num_bytes` is its share of the file, for progress."""

    path: Path
    num_bytes: int

    @abstractmethod
    def read(self, rows: RowFormat) -> Iterator[tuple[str, Row | BadRow]]:
        """Yield (place, row) in order."""

    def read_columns(self, rows: RowFormat) -> ExampleBatch | None:
        """Return the examples of all rows at once; None if rows must be read one by one."""
        return None


def too_long(place: str, num_bytes: int, rows: RowFormat) -> tuple[str, BadRow]:
    """Return a bad row, refused by its size alone."""
    return place, BadRow("row too long", f"{place}: a row of {num_bytes:,} bytes, --max-characters "
                         f"{rows.max_characters} reads at most {rows.max_row_bytes:,}; split it or raise that")
