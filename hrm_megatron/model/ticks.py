"""The ticks of one forward pass as a plain list, used by model, pipeline, KV cache and FLOP count."""
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from hrm_megatron.config import Architecture, ConfigError
from hrm_megatron.model_types import HRM, MODEL_TYPES, ModelType


class Tick(NamedTuple):
    """One application of a stack: state `writes` becomes stack(sum of the states that it `reads`)."""

    stack: str  # "H" (slow) or "L" (fast)
    with_grad: bool
    recompute: bool  # keeps only its input and is recomputed in backward
    reads: str
    writes: str


def split_bp_steps(h_cycles: int, l_cycles: int, bp_steps: int) -> tuple[int, int]:
    """Split `bp_steps` gradient ticks between the stacks: (H ticks, L ticks), the last ones of each.

    Every stack gets at least one, so that every layer parameter always has a gradient. H comes first, the rest is L
    (paper, section on truncated gradients). Raises ConfigError if there are too few ticks or too many are asked for.
    """
    h_bp = min(h_cycles, bp_steps - 1)
    l_bp = bp_steps - h_bp
    if h_bp < 1 or l_bp > h_cycles * l_cycles:
        raise ConfigError(f"bp_steps={bp_steps} does not fit {h_cycles=}, {l_cycles=}: choose 2 to "
                          f"{h_cycles * (l_cycles + 1)}")
    return h_bp, l_bp


def gradient_ticks(kind: ModelType, h_cycles: int, l_cycles: int, bp_steps: int | None) -> tuple[int, int]:
    """Return the numbers of gradient ticks (outer, inner), the last ones of each; `bp_steps` None: all."""
    if kind.inner and kind.outer:
        return split_bp_steps(h_cycles, l_cycles, h_cycles * (l_cycles + 1) if bp_steps is None else bp_steps)
    total = h_cycles * l_cycles if kind.inner else h_cycles
    count = total if bp_steps is None else bp_steps
    if not 1 <= count <= total:
        raise ConfigError(f"{bp_steps=} does not fit {h_cycles=}, {l_cycles=} of a {kind.title}: choose "
                          f"{f'1 to {total}' if total > 1 else 1}")
    return (0, count) if kind.inner else (count, 0)


def trains_embedding(ticks: Sequence[Tick]) -> bool:
    """Whether a gradient reaches the embedding, the initial z_H: in an HRM only if all H ticks build a graph."""
    reached = {"H": True, "L": False}
    for tick in ticks:
        reached[tick.writes] = tick.with_grad and any(reached[state] for state in tick.reads)
    return reached[ticks[-1].writes]


def states_between(ticks: Sequence[Tick], first: int) -> int:
    """Return the number of states needed to resume a pass at tick `first`: z_L, and z_H once a tick has replaced it
    (before that it is the embedding of the tokens)."""
    return 1 + any(tick.writes == "H" for tick in ticks[:first])


def unroll(h_cycles: int, l_cycles: int, bp_steps: int | None = None, recompute_ticks: int = 0,
           model_type: str = HRM) -> list[Tick]:
    """Return the ticks of one forward pass, L before H in each cycle of an HRM; `bp_steps` None: all build a graph.

    The first `recompute_ticks` ticks with a graph keep only their input: their graphs live longest.
    """
    kind = MODEL_TYPES[model_type]
    inner, outer = [kind.inner] * l_cycles if kind.inner else [], [kind.outer] if kind.outer else []
    applications = [*inner, *outer] * h_cycles
    outer_bp, inner_bp = gradient_ticks(kind, h_cycles, l_cycles, bp_steps)
    left = {"outer": len(outer) * h_cycles, "inner": len(inner) * h_cycles}
    ticks = []
    for place, application in enumerate(applications):
        part, graphs = ("outer", outer_bp) if place % (len(inner) + len(outer)) >= len(inner) else ("inner", inner_bp)
        assert application
        ticks.append(Tick(application.stack, left[part] <= graphs, False, application.reads, application.writes))
        left[part] -= 1
    recomputed = [number for number, tick in enumerate(ticks) if tick.with_grad][:recompute_ticks]
    return [tick._replace(recompute=number in recomputed) for number, tick in enumerate(ticks)]


def ticks_of(architecture: Architecture, bp_steps: int | None = None, recompute_ticks: int = 0) -> list[Tick]:
    """Return the ticks of one forward pass of this architecture, see `unroll`."""
    return unroll(architecture.h_cycles, architecture.l_cycles, bp_steps, recompute_ticks, architecture.model_type)
