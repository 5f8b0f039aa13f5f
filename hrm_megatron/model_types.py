"""The architectures that can be trained, as one table: which stacks each has, and what happens at each of its ticks.

A new architecture is one entry. A pass holds two states, z_H and z_L, which begin as the embedding and as the fixed
vector zL_init. Each cycle applies `inner` l_cycles times and then `outer` once; there are h_cycles of them. The head
reads the state that the last tick replaced.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class Application(NamedTuple):
    """What one tick does: state `writes` becomes stack(sum of the states that it `reads`)."""

    stack: str  # "H" or "L": whose weights
    reads: str  # "LH", "L" or "H"
    writes: str  # "H" or "L"


@dataclass(frozen=True)
class ModelType:
    """One architecture; `stacks` names those that have weights.

    `h_cycles`, `l_cycles` and `bp_steps` (at the first step of the warm-up, and after it) are its defaults; `fixed` are
    cycles that cannot differ. `preset_stacks` is how many stacks' layers of an HRM of the same preset each stack has.
    `native` is the reference's class, `native_layers` the name of a stack's layers in its checkpoints.
    """

    stacks: str
    inner: Application | None
    outer: Application | None
    h_cycles: int
    l_cycles: int
    bp_steps: tuple[int, int]
    preset_stacks: int
    title: str
    native: str
    native_layers: str
    fixed: tuple[str, ...] = field(default=())

    @property
    def starts_from_z_l(self) -> bool:
        """Tell whether zL_init, with which z_L begins, is part of the model."""
        return any("L" in each.reads for each in (self.inner, self.outer) if each)


HRM = "hrm"
# Source: HRM-Text, models/baselines; sizes and cycles are those of its configurations.
MODEL_TYPES = {
    HRM: ModelType(
        "HL", Application("L", "LH", "L"), Application("H", "LH", "H"), 2, 3, (2, 5), 1, "HRM",
        "baselines.hrm_nocarry_bp_warmup@HierarchicalReasoningModel", "model.{}_level.core.layers."),
    "transformer": ModelType(
        "L", None, Application("L", "H", "H"), 1, 1, (1, 1), 2, "Transformer",
        "baselines.transformer_wrapper@TransformerWrapper", "model.layers.", ("h_cycles", "l_cycles")),
    "ut": ModelType(
        "L", Application("L", "LH", "L"), None, 1, 4, (2, 2), 2, "Universal Transformer",
        "baselines.ut_nocarry@UniversalTransformer", "model.{}_level.core.layers.", ("h_cycles",)),
    "rins": ModelType(
        "HL", Application("L", "LH", "L"), Application("H", "L", "H"), 1, 7, (5, 5), 1, "RINS",
        "baselines.rins_nocarry@RINS", "model.{}_level.layers.", ("h_cycles",)),
    "trm": ModelType(
        "L", Application("L", "LH", "L"), Application("L", "LH", "H"), 2, 1, (2, 2), 2, "TRM",
        "baselines.trm_nocarry@TinyRecursiveModel", "model.{}_level.core.layers."),
    "trm_match_recurrence": ModelType(
        "L", Application("L", "LH", "L"), Application("L", "LH", "H"), 2, 3, (5, 5), 1, "TRM with HRM's recurrence",
        "baselines.trm_nocarry@TinyRecursiveModel", "model.{}_level.core.layers."),
}
