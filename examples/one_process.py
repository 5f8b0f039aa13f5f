"""Train a small model in this process and measure it on held-out questions; shared by studies of many small runs."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hrm_megatron.parallel.cpu import activate
from hrm_megatron.parallel.log_levels import be_quiet

be_quiet()
activate()

import torch  # noqa: E402
from torch.utils.data import default_collate  # noqa: E402

from hrm_megatron.config import Architecture  # noqa: E402
from hrm_megatron.data.batch import PackedBatch  # noqa: E402
from hrm_megatron.data.dataset import PackedRows  # noqa: E402
from hrm_megatron.data.indexed_examples import IndexedExamples  # noqa: E402
from hrm_megatron.data.mixture import Mixture, Selection  # noqa: E402
from hrm_megatron.model.hrm import HRMModel  # noqa: E402
from hrm_megatron.optim.adam_atan2 import AdamATan2  # noqa: E402
from hrm_megatron.optim.schedule import BPSchedule, LRSchedule  # noqa: E402
from hrm_megatron.planner.flops import rows_flops  # noqa: E402
from hrm_megatron.training.metrics import loss_sums  # noqa: E402
from hrm_megatron.transformer_config import hrm_config  # noqa: E402

MIN_LR_RATIO, WARMUP_FRACTION, BP_WARMUP_FRACTION = 0.1, 0.05, 0.2


@dataclass(frozen=True)
class Recipe:
    """A training run: `steps` steps of `rows_per_step` rows of `row_tokens`; `seed` determines weights and order."""

    architecture: Architecture
    lr: float
    steps: int
    row_tokens: int
    rows_per_step: int
    seed: int


def train_rows(recipe: Recipe, prefix: Path) -> PackedRows:
    """Return the rows of a training run, in order."""
    return PackedRows(Mixture([IndexedExamples(prefix)], recipe.row_tokens, Selection(seed=recipe.seed)),
                      recipe.row_tokens, recipe.seed, recipe.steps * recipe.rows_per_step)


def training(recipe: Recipe, prefix: Path) -> Iterator[tuple[int, int, HRMModel]]:
    """Train on a dataset; yield (step, FLOPs so far, model) after each step. Needs Megatron's process groups, as made
    by `single_rank()`."""
    architecture = recipe.architecture
    model = HRMModel(hrm_config(architecture), recipe.seed)
    embedding = model.embedding.word_embeddings.weight  # its updates are counted separately, as in a run
    groups = [[embedding], [p for p in model.parameters() if p is not embedding]]
    optimizer = AdamATan2([dict(params=group) for group in groups], recipe.lr,
                          has_gradient=lambda group: any(p.grad is not None for p in group["params"]))
    rates = LRSchedule(recipe.lr, MIN_LR_RATIO * recipe.lr, round(WARMUP_FRACTION * recipe.steps), recipe.steps)
    ticks = BPSchedule(*architecture.kind.bp_steps, BP_WARMUP_FRACTION, recipe.steps)
    flops = 0
    for step, batch in enumerate(_batches(train_rows(recipe, prefix), recipe.rows_per_step), 1):
        model.zero_grad()
        loss, labels, _ = loss_sums(batch, model.train()(batch, bp_steps=ticks.at(step)))
        (loss / labels).backward()
        for group in optimizer.param_groups:
            group["lr"] = rates.at(step)
        optimizer.step()
        flops += rows_flops(architecture, ticks.at(step), recipe.row_tokens, batch.lengths, int(labels))
        yield step, flops, model


@torch.no_grad()
def held_out(model: HRMModel, prefix: Path, recipe: Recipe) -> dict[str, float]:
    """Return the mean loss per label of a dataset, and the share of its examples whose labels are all the argmax, as in
    a greedy answer; each example is read once."""
    rows = PackedRows(IndexedExamples(prefix), recipe.row_tokens, 0, 0, fixed=True)
    rows.num_rows = rows.rows_per_epoch
    reports = [loss_sums(batch, model.eval()(batch))[2] for batch in _batches(rows, recipe.rows_per_step)]
    sums = {name: torch.stack([report[name] for report in reports]).sum(0).tolist() for name in reports[0]}
    return {name: total / count for name, (total, count) in sums.items()}


def _batches(rows: PackedRows, per_step: int) -> Iterator[PackedBatch]:
    for first in range(0, len(rows), per_step):
        yield PackedBatch.from_rows(default_collate([rows[i] for i in range(first, min(first + per_step, len(rows)))]))
