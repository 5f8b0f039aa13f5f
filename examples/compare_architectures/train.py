"""Train one architecture of the comparison, and measure it during training."""
from __future__ import annotations

from typing import Any

from examples.compare_architectures.plan import ROW_TOKENS, ROWS_PER_STEP, Plan, Run, architecture_of, steps_of
from examples.one_process import Recipe, held_out, train_rows, training
from examples.study import Questions
from hrm_megatron.training.data import MEASURED_ROWS, first_rows


def train(plan: Plan, run: Run, questions: Questions) -> dict[str, Any]:
    """Train a model and return its row: steps, parameters, and FLOPs, validation loss and exact accuracy at each
    point."""
    architecture = architecture_of(run.model, questions.vocab_size)
    first = train_rows(Recipe(architecture, run.lr, MEASURED_ROWS, ROW_TOKENS, 1, run.seed), questions.train)
    steps, of_budget = steps_of(plan, run.model, questions.vocab_size, first_rows(first)[0])
    recipe = Recipe(architecture, run.lr, steps, ROW_TOKENS, ROWS_PER_STEP, run.seed)
    places = {max(1, steps * (point + 1) // plan.points) for point in range(plan.points)}
    measured: dict[str, list[float]] = {"flops": [], "loss": [], "exact": []}
    parameters = 0
    for step, flops, model in training(recipe, questions.train):
        if step in places:
            found = held_out(model, questions.valid, recipe)
            for name, value in (("flops", flops), ("loss", found["lm loss"]), ("exact", found["exact accuracy"])):
                measured[name].append(value)
            parameters = sum(p.numel() for p in model.parameters())
    return dict(model=run.model, lr=run.lr, seed=run.seed, steps=steps, of_budget=of_budget, parameters=parameters,
                **measured)
