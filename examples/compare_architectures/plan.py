"""The plan of the comparison: every architecture at the FLOPs of one HRM run, at its own best rate, from several
seeds."""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hrm_megatron.config import Architecture, ConfigError
from hrm_megatron.model_types import HRM, MODEL_TYPES
from hrm_megatron.planner.match_flops import Recipe, Rows, matched_steps, run_flops

WIDTH, HEADS, LAYERS = 128, 4, 2  # layers of each stack of the HRM, as in the demo
ROW_TOKENS, ROWS_PER_STEP = 256, 8
BP_WARMUP_FRACTION = 0.2
FIRST_SEED = 1234


@dataclass(frozen=True)
class Plan:
    """The FLOP budget is that of `hrm_steps` steps of the HRM. All `rates` are tried with the first seed; the other
    seeds train at the best one. Each run is measured at `points` evenly spaced steps."""

    hrm_steps: int
    rates: Sequence[float]
    seeds: int
    points: int
    models: Sequence[str] = tuple(MODEL_TYPES)

    def __post_init__(self) -> None:
        for name in ("hrm_steps", "seeds", "points"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least 1")
        for rate in self.rates:
            if not 0 < rate < 1:
                raise ConfigError(f"--rates {rate:g}: a learning rate is between 0 and 1")
        if unknown := [model for model in self.models if model not in MODEL_TYPES]:
            raise ConfigError(f"--models {unknown[0]}: choose from {', '.join(MODEL_TYPES)}")
        if len({*self.models}) < len(self.models) or len({*self.rates}) < len(self.rates):
            raise ConfigError("--models, --rates: one is given twice; leave it out")

    def trials(self) -> list[Run]:
        """Return the runs of the first seed."""
        return [Run(model, rate, FIRST_SEED) for model in self.models for rate in self.rates]

    def repeats(self, best: dict[str, float]) -> list[Run]:
        """Return the runs of the other seeds at these rates."""
        return [Run(model, best[model], FIRST_SEED + seed) for model in self.models for seed in range(1, self.seeds)]


@dataclass(frozen=True)
class Run:
    """One model to train."""

    model: str
    lr: float
    seed: int


def architecture_of(model: str, vocab_size: int) -> Architecture:
    """Return the architecture of a model type: all have as many weights as the HRM, except `trm_match_recurrence` with
    half as many in its layers."""
    kind = MODEL_TYPES[model]
    return Architecture(LAYERS * kind.preset_stacks, WIDTH, HEADS, 2 * WIDTH, vocab_size, kind.h_cycles, kind.l_cycles,
                        model_type=model)


def steps_of(plan: Plan, model: str, vocab_size: int, rows: Rows) -> tuple[int, float]:
    """Return a model's number of steps, and their FLOPs / those of the HRM, on rows like these."""
    def recipe(model: str) -> Recipe:
        return Recipe(architecture_of(model, vocab_size), (*MODEL_TYPES[model].bp_steps, BP_WARMUP_FRACTION))
    budget = run_flops(recipe(HRM), plan.hrm_steps, ROW_TOKENS, ROWS_PER_STEP, rows)
    steps = matched_steps(recipe(model), budget, ROW_TOKENS, ROWS_PER_STEP, rows)
    return steps, run_flops(recipe(model), steps, ROW_TOKENS, ROWS_PER_STEP, rows) / budget


def best_rates(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return each model's rate with the lowest final loss, from the rows of `trials`; raises ConfigError if a model
    diverges at all of them."""
    found: dict[str, dict[float, float]] = {}
    for row in rows:
        rates = found.setdefault(row["model"], {})
        if math.isfinite(row["loss"][-1]):
            rates[row["lr"]] = row["loss"][-1]
    if diverging := [model for model, rates in found.items() if not rates]:
        raise ConfigError(f"--rates: {diverging[0]} ends without a finite loss at all of them; give lower ones")
    return {model: min(rates, key=rates.__getitem__) for model, rates in found.items()}
