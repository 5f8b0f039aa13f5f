"""How HRM-Text's configurations express an architecture and its gradient ticks, for each of its networks."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from hrm_megatron.config import Architecture, ConfigError
from hrm_megatron.convert.checkpoint import Training
from hrm_megatron.convert.setting import whole
from hrm_megatron.model.ticks import gradient_ticks
from hrm_megatron.model_types import HRM, MODEL_TYPES


class Recurrence(NamedTuple):
    """Stacks and ticks of a configuration; `bp`: (initial, final gradient ticks, fraction of training they rise)."""

    model_type: str
    num_layers: int  # per stack
    h_cycles: int
    l_cycles: int
    bp: tuple[int, int, float]


def read_recurrence(arch: Mapping[str, Any]) -> Recurrence:
    """Read the `arch` section of a configuration."""
    def count(name: str, *default: int) -> int:
        return whole(f"arch.{name}", arch.get(name, *default) if default else arch[name])

    types = [name for name, kind in MODEL_TYPES.items() if kind.native == arch.get("name")]
    if not types:
        raise ConfigError(f"arch.name: {arch.get('name')!r} is no network that is built here "
                          f"({', '.join(dict.fromkeys(kind.native for kind in MODEL_TYPES.values()))})")
    layers, half = count("n_layers"), bool(arch.get("half_layers"))
    if half and layers % 2:
        raise ConfigError(f"arch.n_layers: {layers} layers cannot be shared evenly by two stacks")
    model_type = types[0]
    if len(types) > 1:  # TRM and its twin share a name and differ in `half_layers`
        model_type = next(name for name in types if (MODEL_TYPES[name].preset_stacks == 1) == half)
    kind = MODEL_TYPES[model_type]
    h_cycles = count("H_cycles", kind.h_cycles)
    l_cycles = count("L_cycles" if "L_cycles" in arch else "cycles", kind.l_cycles)
    if model_type == HRM:
        bp = count("bp_min_steps"), count("bp_max_steps"), float(arch["bp_warmup_ratio"])
    else:
        outer = count("H_bp_steps", int(kind.outer is not None))
        inner = count("L_bp_steps" if "L_bp_steps" in arch else "L_bp_cycles" if "L_bp_cycles" in arch else
                      "bp_cycles") if kind.inner else 0
        bp = outer + inner, outer + inner, 0.0
        if (outer, inner) != gradient_ticks(kind, h_cycles, l_cycles, outer + inner):
            raise ConfigError(f"arch.H_bp_steps and L_bp_steps: {outer} and {inner} are no split that is built here; "
                              "all H ticks have a gradient where L ticks have more than one")
    return Recurrence(model_type, layers // 2 if half else layers, h_cycles, l_cycles, bp)


def write_recurrence(a: Architecture, t: Training) -> dict[str, Any]:
    """Return the `arch` settings for an architecture and its gradient ticks; ConfigError if none express them."""
    kind = a.kind
    halves = kind.preset_stacks == 1
    said: dict[str, Any] = dict(name=kind.native, n_layers=a.num_layers * (2 if halves else 1))
    if a.model_type == HRM:
        return dict(said, half_layers=True, H_cycles=a.h_cycles, L_cycles=a.l_cycles, bp_min_steps=t.bp_min_steps,
                    bp_max_steps=t.bp_max_steps, bp_warmup_ratio=t.bp_warmup_fraction)
    if t.bp_min_steps != t.bp_max_steps:
        raise ConfigError(f"bp_steps rise from {t.bp_min_steps} to {t.bp_max_steps}, but HRM-Text's {kind.title} has "
                          "no such warm-up: save as megatron")
    outer, inner = gradient_ticks(kind, a.h_cycles, a.l_cycles, t.bp_max_steps)
    spelled = {
        "transformer": {},
        "ut": dict(cycles=a.l_cycles, bp_cycles=inner),
        "rins": dict(half_layers=True, L_cycles=a.l_cycles, L_bp_cycles=inner),
    }
    of_trm = dict(half_layers=halves, H_cycles=a.h_cycles, L_cycles=a.l_cycles, H_bp_steps=outer, L_bp_steps=inner)
    return said | spelled.get(a.model_type, of_trm)
