"""How transformers' configurations express gradient ticks: those of the L stack per cycle; each H tick has one."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hrm_megatron.convert.setting import whole
from hrm_megatron.model.ticks import split_bp_steps

BP_CYCLES = "L_bp_cycles"


def bp_list(h_cycles: int, l_cycles: int, bp_steps: int) -> list[int]:
    """Return the gradient ticks of the L stack in each H cycle: the last ones overall."""
    _, l_bp = split_bp_steps(h_cycles, l_cycles, bp_steps)
    return [min(l_cycles, max(0, l_bp - l_cycles * (h_cycles - 1 - cycle))) for cycle in range(h_cycles)]


def bp_steps_of(config: Mapping[str, Any], h_cycles: int, noted: object) -> int:
    """Return the number of gradient ticks of a configuration; raises ConfigError if one is not a whole number.

    The configuration cannot express H ticks without a gradient: the number that an export has `noted` is used if it is
    consistent with the configuration.
    """
    # transformers' default is [2], and 1 for every earlier cycle.
    l_bp = [1] * h_cycles + [whole(BP_CYCLES, count) for count in config.get(BP_CYCLES) or [2]]
    spelled = max(2, h_cycles + sum(l_bp[-h_cycles:]))
    return next((steps for steps in range(2, h_cycles + 1) if steps == noted and spelled == h_cycles + 1), spelled)
