"""Numbers of foreign settings, as they are written: none is cut to a whole one, or read out of a text."""
from __future__ import annotations

from hrm_megatron.config import ConfigError


def whole(name: str, value: object) -> int:
    """Return the value of this setting, a whole number; raises ConfigError where it is something else."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{name}: {value!r} is no whole number; correct it, or copy the folder again")
    return value


def number(name: str, value: object) -> float:
    """Return the value of this setting, a number; raises ConfigError where it is something else."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(f"{name}: {value!r} is no number; correct it, or copy the folder again")
    return float(value)
