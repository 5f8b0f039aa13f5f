"""What a piece of an input file is, whatever its kind."""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hrm_megatron.data.example import BadRow, RowFormat

Row = dict[str, Any]


@dataclass(frozen=True)
class Piece(ABC):
    """Consecutive rows of a file, which travel to a worker. `num_bytes` of the file are done when it is."""

    path: Path
    num_bytes: int

    @abstractmethod
    def read(self, rows: RowFormat) -> Iterator[tuple[str, Row | BadRow]]:
        """Yield (place, row) in order."""
