"""Number of steps at which one model's run costs as many FLOPs as another's, for comparisons at equal FLOPs.

Sizes stay those of the preset, in which HRM-Text's baselines have as many weights as the HRM (TRM with HRM's
recurrence: half as many); a model with cheaper steps takes more steps over the same data. Both runs are counted over
the same rows, every step with its own number of gradient ticks.
"""
from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from hrm_megatron.config import Architecture, ConfigError, LoRA
from hrm_megatron.optim.schedule import BPSchedule
from hrm_megatron.planner.flops import rows_flops, steps_by_bp

TOLERANCE = 0.01  # relative, of the FLOPs to match
Rows = Sequence[Sequence[tuple[int, int]]]


@dataclass(frozen=True)
class Recipe:
    """A model, its bp_steps warm-up (first, last, fraction of the run), and its adapters if only those are trained."""

    architecture: Architecture
    bp: tuple[int, int, float]
    lora: LoRA | None = None


def run_flops(recipe: Recipe, steps: int, row_tokens: int, rows_per_step: int, rows: Rows,
              labels: int | None = None) -> float:
    """Return the FLOPs of a run of `steps` steps whose rows are like `rows`, a sample of rows with (prefix, response)
    of each example; `labels` as in `rows_flops`."""
    return sum(count * rows_flops(recipe.architecture, bp_steps, row_tokens, rows, labels, recipe.lora) * rows_per_step
               / len(rows) for bp_steps, count in steps_by_bp(BPSchedule(*recipe.bp, steps)).items())


def matched_steps(recipe: Recipe, budget: float, row_tokens: int, rows_per_step: int, rows: Rows,
                  labels: int | None = None) -> int:
    """Return the number of steps whose FLOPs are closest to `budget`; raises ConfigError if they differ by more than
    TOLERANCE."""
    def cost(steps: int) -> float:
        return run_flops(recipe, steps, row_tokens, rows_per_step, rows, labels)
    most = 1
    while cost(most) < budget:
        most *= 2
    above = 1 + bisect_left(range(1, most + 1), budget, key=cost)
    steps = min((n for n in (above - 1, above) if n), key=lambda n: abs(cost(n) - budget))
    if abs(off := cost(steps) / budget - 1) > TOLERANCE:
        raise ConfigError(f"{steps} steps of a {recipe.architecture.kind.title} are {off:+.1%} of the FLOPs to match: "
                          "give more --train-iters, or smaller steps")
    return steps
