"""The table of trainable architectures: the stacks of each, and what each of its ticks does.

A new architecture is one entry. A forward pass holds two states: z_H starts as the embedding, z_L as the fixed vector
zL_init. Each of the h_cycles cycles applies `inner` l_cycles times and then `outer` once. The head reads the state that
the last tick wrote.
"""
from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple


class Application(NamedTuple):
    """One tick: state `writes` becomes stack(sum of the states that it `reads`)."""

    stack: str  # "H" or "L": the stack whose weights are used
    reads: str  # "LH", "L" or "H"
    writes: str  # "H" or "L"


@dataclass(frozen=True)
class ModelType:
    """One architecture; `stacks` names those that have weights.

    `h_cycles`, `l_cycles` and `bp_steps` (at the start of the warm-up, after it) are defaults; `fixed` names the cycle
    counts that cannot be changed. Each stack has `preset_stacks` times the layers of one HRM stack of the same preset.
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
        """Whether some tick reads z_L, so that zL_init is part of the model."""
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
