"""The command blocks of README and docs, and how each says that it is tested."""
from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"(?:<!-- tested: (?P<how>[^\n]+) -->\n)?```bash\n(?P<text>.*?)```", re.DOTALL)
GPUS = re.compile(r"parsed on ([\d, ]+) GPUs")


@dataclass(frozen=True)
class Block:
    """One block of commands; `how` is the text of the comment above it: `make`, `cpu`, `parsed on N, M GPUs` or
    `not run, REASON`."""

    place: str
    how: str
    text: str

    @property
    def gpus(self) -> list[int]:
        """Sizes of the machines for which its training commands are parsed."""
        found = GPUS.fullmatch(self.how)
        return [int(count) for count in found[1].split(",")] if found else []


def documents() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks() -> list[Block]:
    """All blocks, in the order of the text."""
    found = []
    for path in documents():
        text = path.read_text(encoding="utf-8")
        for match in BLOCK.finditer(text):
            line = text[:match.start("text")].count("\n") + 1
            found.append(Block(f"{path.relative_to(ROOT)}:{line}", match["how"] or "", match["text"]))
    return found


def table(path: Path, first_column: str) -> list[dict[str, str]]:
    """Rows of the Markdown table whose first column has this head."""
    lines = iter(path.read_text(encoding="utf-8").splitlines())
    for line in lines:
        cells = [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        if line.startswith("|") and cells[0] == first_column and "GPUs" in cells:
            next(lines)
            rows = []
            for row in lines:
                if not row.startswith("|"):
                    return rows
                rows.append(dict(zip(cells, (cell.strip() for cell in row.strip("|").split("|")), strict=True)))
    raise AssertionError(f"{path}: no table that begins with {first_column}")
