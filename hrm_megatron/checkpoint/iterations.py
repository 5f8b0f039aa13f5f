"""How the folders of a run's iterations are named (Megatron-LM, training/checkpointing.py, get_checkpoint_name)."""
from __future__ import annotations

import re

RELEASE = "release"  # in place of an iteration: weights that no run goes on from
_NAME = re.compile(r"iter_(\d{7,})")


def folder_name(iteration: int) -> str:
    """Name the folder of an iteration."""
    return f"iter_{iteration:07d}"


def is_iteration(name: str) -> bool:
    """Tell whether a folder of this name holds an iteration."""
    return _NAME.fullmatch(name) is not None


def iteration_of(name: str) -> int:
    """Return the iteration of a folder's name; ValueError for any other name. Names of eight digits sort before those
    of seven: sort by this number."""
    if (found := _NAME.fullmatch(name)) is None:
        raise ValueError(f"{name}: names no iteration")
    return int(found[1])
