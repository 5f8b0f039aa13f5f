"""The command that makes a folder which a run can begin from, for errors that ask for one."""
from __future__ import annotations

import shlex
from pathlib import Path


def converting(load: str | Path, form: str, save: str, *flags: str) -> str:
    """Spell the command that converts a folder of this format, or one iteration, into Megatron's."""
    return shlex.join(["python", "tools/convert_checkpoint.py", "--load", str(load), "--load-format", form, *flags,
                       "--save", save, "--save-format", "megatron"])


def by_converting(iteration: Path, made: str, *flags: str) -> str:
    """Say how to convert one iteration, and what to give then: a folder beside its own, named after what was `made`."""
    folder = f"{iteration.parent}_{iteration.name}_{made}"
    return f"by `{converting(iteration, 'megatron', folder, *flags)}`, and give {folder} without --ckpt-step"
