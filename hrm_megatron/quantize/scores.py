"""Evaluate quantized models on held-out rows, and their divergence from the full model."""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hrm_megatron.config import Architecture
from hrm_megatron.quantize.recurrence import Recurrence, Rows, Weights
from hrm_megatron.quantize.tuning import divergence


@dataclass(frozen=True)
class Scores:
    """Over all labels of some rows: mean cross-entropy, mean KL divergence from the full model (both in nats), and the
    share of examples in which every label is the most likely token, with teacher forcing."""

    loss: float
    exact_accuracy: float
    divergence: float


@torch.no_grad()
def score(architecture: Architecture, full: Weights, models: Mapping[str, Weights],
          rows: Iterable[Rows]) -> dict[str, Scores]:
    """Score models with these weights, and their divergence from the full model, on the same rows."""
    reference = Recurrence(architecture, full)
    sums = {name: torch.zeros(3, dtype=torch.float64) for name in models}
    labels = examples = 0
    for each in rows:
        batch = each.batch
        expected = reference.label_logits(reference.states(each), each)
        labels += len(batch.label_index)
        examples += batch.num_examples
        for name, weights in models.items():
            model = Recurrence(architecture, weights)
            logits = model.label_logits(model.states(each), each)
            wrong = (logits.argmax(-1) != batch.flat_labels).long()
            per_example = wrong.new_zeros(batch.num_examples).index_add_(0, batch.label_example, wrong)
            sums[name] += torch.stack([F.cross_entropy(logits, batch.flat_labels, reduction="sum").double(),
                                       (per_example == 0).sum().double(),
                                       divergence(expected, logits).sum().double()]).cpu()
    return {name: Scores(*(total / torch.tensor([labels, examples, labels])).tolist()) for name, total in sums.items()}


def table(scores: Mapping[str, Scores], full: str) -> list[str]:
    """Return the lines of a table of scores; increases of the loss are relative to the model named `full`."""
    lines = [f"{'':28} {'loss':>8} {'increase':>9} {'exact':>7} {'KL':>9}"]
    for name, each in scores.items():
        lines.append(f"{name:28} {each.loss:8.4f} {each.loss - scores[full].loss:+9.4f} {each.exact_accuracy:7.1%} "
                     f"{each.divergence:9.5f}")
    return lines
