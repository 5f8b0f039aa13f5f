"""Filter the lines of a training run that the demo shows."""
from __future__ import annotations

import re

SHOWN = re.compile(r"(?:step +\d+/|checkpoint: |warning: )")


def training_progress(line: str) -> str | None:
    """Return lines about steps, validations, saves, warnings and the starting checkpoint; None for others."""
    return line.rstrip() if SHOWN.match(line) else None


def minutes(seconds: float) -> str:
    """Format a time as m:ss."""
    return f"{round(seconds) // 60}:{round(seconds) % 60:02}"
