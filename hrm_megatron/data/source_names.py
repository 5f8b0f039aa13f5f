"""The name of a source in a dataset: its path below the --input that it was found under, as one word."""
from __future__ import annotations

from collections.abc import Sequence
from glob import has_magic
from itertools import takewhile
from pathlib import Path

SEPARATOR = "__"  # replaces / in names, as in HRM-Text, data_io


def source_names(inputs: Sequence[str], paths: Sequence[Path]) -> list[str]:
    """Return the name of each file that `inputs` have resolved to; two may get the same name."""
    roots = [_root(given) for given in inputs]
    return [SEPARATOR.join(next((path.relative_to(root) for root in roots if path.is_relative_to(root)),
                                Path(path.name)).parts) for path in paths]


def _root(given: str) -> Path:
    """Return the base folder of an input: itself, the folder of a file, or the part before the first wildcard."""
    path = Path(given)
    if path.is_dir():
        return path
    if path.exists() or not has_magic(given):
        return path.parent
    return Path(*takewhile(lambda part: not has_magic(part), path.parts))
