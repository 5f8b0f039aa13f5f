"""What a source is called in a dataset: its path below the --input that it was found under, in one word."""
from __future__ import annotations

from collections.abc import Sequence
from glob import has_magic
from itertools import takewhile
from pathlib import Path

SEPARATOR = "__"  # for / in names: HRM-Text, data_io


def source_names(inputs: Sequence[str], paths: Sequence[Path]) -> list[str]:
    """Name each of the files that `inputs` have led to; two may get the same name."""
    roots = [_root(given) for given in inputs]
    return [SEPARATOR.join(next((path.relative_to(root) for root in roots if path.is_relative_to(root)),
                                Path(path.name)).parts) for path in paths]


def _root(given: str) -> Path:
    """Return the folder of an input: itself, the one that a file is in, or the one before the first wildcard."""
    path = Path(given)
    if path.is_dir():
        return path
    if path.exists() or not has_magic(given):
        return path.parent
    return Path(*takewhile(lambda part: not has_magic(part), path.parts))
