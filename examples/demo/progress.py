"""Which lines of a training run the demo passes on."""
from __future__ import annotations

import re

SHOWN = re.compile(r"(?:step +\d+/|checkpoint: |warning: )")


def training_progress(line: str) -> str | None:
    """Pass on how training goes: steps, validations, saves, and where the run begins."""
    return line.rstrip() if SHOWN.match(line) else None


def minutes(seconds: float) -> str:
    """Spell a time as m:ss."""
    return f"{round(seconds) // 60}:{round(seconds) % 60:02}"
