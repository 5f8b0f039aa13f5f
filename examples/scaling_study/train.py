"""Train one model of the study in this process and measure its loss on the validation questions."""
from __future__ import annotations

from typing import Any

from examples.one_process import Recipe, held_out, training
from examples.scaling_study.plan import TOKENS_PER_STEP, Run
from examples.study import Questions

ROW_TOKENS = 256
SEED = 1234  # of weights and rows, the same for all runs


def train(run: Run, questions: Questions) -> dict[str, Any]:
    """Train a model and return its row: parameters, tokens, FLOPs of the whole training and validation loss. Needs
    Megatron's process groups, as made by `single_rank()`."""
    recipe = Recipe(run.architecture(questions.vocab_size), run.lr, run.steps, ROW_TOKENS,
                    TOKENS_PER_STEP // ROW_TOKENS, SEED)
    *_, (_, flops, model) = training(recipe, questions.train)
    return dict(model=run.model, width=run.width, parameters=sum(p.numel() for p in model.parameters()),
                tokens=run.tokens, lr=run.lr, loss=held_out(model, questions.valid, recipe)["lm loss"], flops=flops,
                held_out=run.held_out)
