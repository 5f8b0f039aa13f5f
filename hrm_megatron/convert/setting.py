"""Strictly typed numbers from foreign configurations: nothing is truncated to an integer or parsed from a string."""
from __future__ import annotations

from hrm_megatron.config import ConfigError


def whole(name: str, value: object) -> int:
    """Return the value of this setting if it is an integer; raises ConfigError otherwise."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{name}: {value!r} is no whole number; correct it, or copy the folder again")
    return value


def number(name: str, value: object) -> float:
    """Return the value of this setting if it is a number; raises ConfigError otherwise."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(f"{name}: {value!r} is no number; correct it, or copy the folder again")
    return float(value)
