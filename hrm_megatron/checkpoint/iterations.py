"""Names of the folders of iterations (Megatron-LM, training/checkpointing.py, get_checkpoint_name)."""
from __future__ import annotations

import re

RELEASE = "release"  # in place of an iteration: weights that no run resumes from
_NAME = re.compile(r"iter_(\d{7,})")


def folder_name(iteration: int) -> str:
    """Return the name of the folder of an iteration."""
    return f"iter_{iteration:07d}"


def is_iteration(name: str) -> bool:
    """Return whether a folder of this name holds an iteration."""
    return _NAME.fullmatch(name) is not None


def iteration_of(name: str) -> int:
    """Return the iteration of a folder name; ValueError for any other name. Sort by this number: as text, names of
    eight digits may sort before those of seven."""
    if (found := _NAME.fullmatch(name)) is None:
        raise ValueError(f"{name}: names no iteration")
    return int(found[1])
