"""Train one model of the study in this process, and measure its loss on the validation questions."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hrm_megatron.parallel.cpu import activate
from hrm_megatron.parallel.log_levels import be_quiet

be_quiet()
activate()

import torch  # noqa: E402
from torch.utils.data import default_collate  # noqa: E402

from examples.scaling_study.plan import TOKENS_PER_STEP, Run  # noqa: E402
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

ROW_TOKENS = 256
MIN_LR_RATIO, WARMUP_FRACTION, BP_WARMUP_FRACTION = 0.1, 0.05, 0.2
SEED = 1234  # of weights and rows, the same for all runs


def batches(rows: PackedRows) -> Iterator[PackedBatch]:
    """Yield the rows, so many of them at once as a step has."""
    per_step = TOKENS_PER_STEP // ROW_TOKENS
    for first in range(0, len(rows), per_step):
        yield PackedBatch.from_rows(default_collate([rows[i] for i in range(first, min(first + per_step, len(rows)))]))


@torch.no_grad()
def held_out_loss(model: HRMModel, prefix: Path) -> float:
    """Mean loss of the labels of a dataset, each example read once."""
    rows = PackedRows(IndexedExamples(prefix), ROW_TOKENS, 0, 0, fixed=True)
    rows.num_rows = rows.rows_per_epoch
    reports = torch.stack([loss_sums(batch, model(batch))[2]["lm loss"] for batch in batches(rows)])
    loss, labels = reports.sum(0).tolist()
    return float(loss / labels)


def train(run: Run, train_prefix: Path, valid_prefix: Path, vocab_size: int) -> dict[str, Any]:
    """Train a model and return its row: parameters, tokens, FLOPs of the whole training and validation loss. Needs
    Megatron's groups, as `single_rank()` makes them."""
    architecture = run.architecture(vocab_size)
    model = HRMModel(hrm_config(architecture), SEED)
    optimizer = AdamATan2(model.parameters(), run.lr)
    rates = LRSchedule(run.lr, MIN_LR_RATIO * run.lr, round(WARMUP_FRACTION * run.steps), run.steps)
    ticks = BPSchedule(*architecture.kind.bp_steps, BP_WARMUP_FRACTION, run.steps)
    rows = PackedRows(Mixture([IndexedExamples(train_prefix)], ROW_TOKENS, Selection(seed=SEED)), ROW_TOKENS, SEED,
                      run.tokens // ROW_TOKENS)
    flops = 0
    for step, batch in enumerate(batches(rows), 1):
        model.zero_grad()
        loss, labels, _ = loss_sums(batch, model(batch, bp_steps=ticks.at(step)))
        (loss / labels).backward()
        for group in optimizer.param_groups:
            group["lr"] = rates.at(step)
        optimizer.step()
        flops += rows_flops(architecture, ticks.at(step), ROW_TOKENS, batch.lengths)
    model.eval()
    return dict(model=run.model, width=run.width, parameters=sum(p.numel() for p in model.parameters()),
                tokens=run.tokens, lr=run.lr, loss=held_out_loss(model, valid_prefix), flops=flops,
                held_out=run.held_out)
