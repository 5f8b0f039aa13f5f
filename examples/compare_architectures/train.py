"""Train one architecture of the comparison, and measure it on the way."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from examples.compare_architectures.plan import ROW_TOKENS, ROWS_PER_STEP, Plan, Run, architecture_of, steps_of
from examples.one_process import Recipe, held_out, train_rows, training
from hrm_megatron.data.batch import PackedBatch

MEASURED_ROWS = 64  # whose lengths stand for all


def train(plan: Plan, run: Run, train_prefix: Path, valid_prefix: Path, vocab_size: int) -> dict[str, Any]:
    """Train a model and return its row: steps, and FLOPs, validation loss and exact accuracy at each point."""
    architecture = architecture_of(run.model, vocab_size)
    first = train_rows(Recipe(architecture, run.lr, MEASURED_ROWS, ROW_TOKENS, 1, run.seed), train_prefix)
    lengths = [PackedBatch.from_row(first[i]).lengths[0] for i in range(MEASURED_ROWS)]
    steps, of_budget = steps_of(plan, run.model, vocab_size, lengths)
    recipe = Recipe(architecture, run.lr, steps, ROW_TOKENS, ROWS_PER_STEP, run.seed)
    places = {max(1, steps * (point + 1) // plan.points) for point in range(plan.points)}
    measured: dict[str, list[float]] = {"flops": [], "loss": [], "exact": []}
    parameters = 0
    for step, flops, model in training(recipe, train_prefix):
        if step in places:
            found = held_out(model, valid_prefix, recipe)
            for name, value in (("flops", flops), ("loss", found["lm loss"]), ("exact", found["exact accuracy"])):
                measured[name].append(value)
            parameters = sum(p.numel() for p in model.parameters())
    return dict(model=run.model, lr=run.lr, seed=run.seed, steps=steps, of_budget=of_budget, parameters=parameters,
                **measured)
