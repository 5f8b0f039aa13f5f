"""Megatron's syntax for data paths: one prefix, several, or several with a weight before each."""
from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

from megatron.core.datasets.utils import get_blend_from_list

from hrm_megatron.config import ConfigError


@dataclass(frozen=True)
class Blend:
    """Prefixes of datasets and, if given, their weights; `flag` is the flag that named them."""

    flag: str
    paths: tuple[str, ...]
    weights: tuple[float, ...] = ()

    @classmethod
    def of(cls, flag: str, values: Sequence[str] | None) -> Blend | None:
        """Parse the values of a flag as Megatron does; return None if it is not given."""
        if not values:
            return None
        said = f"{flag} {' '.join(values)}"
        numbers = [_is_number(value) for value in values]
        if len(values) > 1 and any(numbers) and numbers != [True, False] * (len(values) // 2):
            raise ConfigError(f"{said}: some have a weight before them and some not; give one to each")
        paths, weights = get_blend_from_list([*values])
        places = [os.path.realpath(path) for path in paths]
        for path, place in zip(paths, places, strict=True):
            if places.count(place) > 1:
                other = next(other for other, at in zip(paths[::-1], places[::-1], strict=True) if at == place)
                raise ConfigError(f"{said}: {path} is there twice" + (f", also as {other}" if other != path else "")
                                  + "; raise its weight instead")
        for weight in weights or ():
            if not (math.isfinite(weight) and weight > 0):
                raise ConfigError(f"{said}: weight {weight:g} is not above 0; leave that dataset out")
        return cls(flag, tuple(paths), tuple(weights or ()))


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
