"""Record a benchmark's result as a row of a table in a Markdown file, with all that is needed to repeat it."""
from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from hrm_megatron.config import ConfigError
from hrm_megatron.convert.file_mode import follow_umask
from hrm_megatron.program import write_aside

HEADING = "## Training on a GPU"
NOTHING_YET = "Nothing has been measured yet."
DISTRIBUTIONS = ("megatron-core", "transformer-engine", "transformers")


def device_name() -> str:
    """Return the name of the device that a run trains on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()


def versions() -> str:
    """Return driver, CUDA and library versions as text; what is not installed is omitted."""
    found = [f"torch {torch.__version__}"]
    if torch.cuda.is_available() and shutil.which("nvidia-smi"):
        said = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                              capture_output=True, text=True)
        found.insert(0, f"driver {said.stdout.split()[0] if said.stdout else 'unknown'}, CUDA {torch.version.cuda}")
    for name in DISTRIBUTIONS:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def output_folder(given: Path | None) -> Path:
    """Create and return the folder for a benchmark's output; a new temporary one if none is given."""
    if given is None:
        given = Path(tempfile.mkdtemp(prefix="hrm-benchmark-"))
        follow_umask(given)
    given.mkdir(parents=True, exist_ok=True)
    return given


def add_row(file: Path, row: Mapping[str, str]) -> None:
    """Add `row`, column > value, to the table that `check_table` finds; the file is replaced atomically."""
    lines, end, table = check_table(file, row.keys())
    if table:
        lines.insert(table[-1] + 1, _line(row.values()))
    else:
        after = lines[end:]
        while lines[end - 1] in ("", NOTHING_YET):
            end -= 1
        lines = [*lines[:end], "", _line(row), "|" + "---|" * len(row), _line(row.values()), *([""] if after else []),
                 *after]
    write_aside(file, "\n".join(lines) + "\n")


def check_table(file: Path, columns: Iterable[str]) -> tuple[list[str], int, list[int]]:
    """Return the file's lines, the index of the line after the section HEADING, and the indices of its table's lines.

    Raises ConfigError if the file or the heading is missing, or the table has other columns.
    """
    lines = file.read_text().splitlines() if file.exists() else []
    if HEADING not in lines:
        raise ConfigError(f"--record {file}: has no line '{HEADING}'; add one where the table shall be")
    start = lines.index(HEADING) + 1
    end = next((i for i in range(start, len(lines)) if lines[i].startswith("#")), len(lines))
    table = [i for i in range(start, end) if lines[i].startswith("|")]
    if table and lines[table[0]] != _line(columns):
        raise ConfigError(f"--record {file}: the table under '{HEADING}' has other columns; it needs {_line(columns)}")
    return lines, end, table


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
