"""The command that converts a checkpoint into one that a run can load, for error messages."""
from __future__ import annotations

import shlex
from pathlib import Path


def converting(load: str | Path, form: str, save: str, *flags: str) -> str:
    """Return the command that converts a folder of format `form`, or one iteration, to Megatron's format."""
    return shlex.join(["python", "tools/convert_checkpoint.py", "--load", str(load), "--load-format", form, *flags,
                       "--save", save, "--save-format", "megatron"])


def by_converting(iteration: Path, made: str, *flags: str) -> str:
    """Say how to convert one iteration, and which folder to give then: one beside its run's, with suffix `made`."""
    folder = f"{iteration.parent}_{iteration.name}_{made}"
    return f"by `{converting(iteration, 'megatron', folder, *flags)}`, and give {folder} without --ckpt-step"
