"""The ticks of one forward pass, as a plain list that model, pipeline, cache and FLOP count all read."""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hrm_megatron.config import ConfigError


class Tick(NamedTuple):
    """One application of a stack."""

    stack: str  # "H" (slow) or "L" (fast)
    with_grad: bool
    recompute: bool = False  # keeps only its input and is recomputed in backward


def split_bp_steps(h_cycles: int, l_cycles: int, bp_steps: int) -> tuple[int, int]:
    """Share `bp_steps` gradient ticks between the stacks: (H ticks, L ticks), the last ones of each.

    Every stack keeps at least one, so that no parameter of a layer is ever without a gradient. Raises
    ConfigError where the ticks cannot be had (paper section on truncated gradients; H first, the rest L).
    """
    h_bp = min(h_cycles, bp_steps - 1)
    l_bp = bp_steps - h_bp
    if h_bp < 1 or l_bp > h_cycles * l_cycles:
        raise ConfigError(f"bp_steps={bp_steps} does not fit {h_cycles=}, {l_cycles=}: choose 2 to "
                          f"{h_cycles * (l_cycles + 1)}")
    return h_bp, l_bp


def trains_embedding(h_cycles: int, bp_steps: int) -> bool:
    """Tell whether a gradient reaches the embedding: only through a graph over all H ticks."""
    return bp_steps > h_cycles


def states_between(ticks: Sequence[Tick], first: int) -> int:
    """Count the states from which a pass goes on at tick `first`: z_L and, once an H tick has run, z_H, which before
    is the embedding of the tokens."""
    return 1 + any(tick.stack == "H" for tick in ticks[:first])


def unroll(h_cycles: int, l_cycles: int, bp_steps: int | None = None, recompute_ticks: int = 0) -> list[Tick]:
    """List the ticks of one forward pass, L before H in each cycle; `bp_steps` None: all build a graph.

    The first `recompute_ticks` of those with a graph keep only their input: it is their graphs that live longest.
    """
    total_l = h_cycles * l_cycles
    h_bp, l_bp = split_bp_steps(h_cycles, l_cycles, h_cycles + total_l if bp_steps is None else bp_steps)
    ticks = []
    for cycle in range(h_cycles):
        first_l = cycle * l_cycles
        ticks += [Tick("L", i >= total_l - l_bp) for i in range(first_l, first_l + l_cycles)]
        ticks.append(Tick("H", cycle >= h_cycles - h_bp))
    recomputed = [number for number, tick in enumerate(ticks) if tick.with_grad][:recompute_ticks]
    return [tick._replace(recompute=number in recomputed) for number, tick in enumerate(ticks)]
