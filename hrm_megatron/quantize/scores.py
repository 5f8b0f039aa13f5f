"""How well a model answers on rows that it was not calibrated with, and how far it is from the full one."""
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
    """Over all labels of some rows: mean cross-entropy and KL divergence from the full model (nats), and the share of
    examples of whose labels each is the likeliest token, the answer so far being right."""

    loss: float
    exact_accuracy: float
    divergence: float


@torch.no_grad()
def score(architecture: Architecture, full: Weights, models: Mapping[str, Weights],
          rows: Iterable[Rows]) -> dict[str, Scores]:
    """Score models of these weights against the full one, on the same rows."""
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
    """Lines of a table of these scores; increases of the loss are counted from the model called `full`."""
    lines = [f"{'':28} {'loss':>8} {'increase':>9} {'exact':>7} {'KL':>9}"]
    for name, each in scores.items():
        lines.append(f"{name:28} {each.loss:8.4f} {each.loss - scores[full].loss:+9.4f} {each.exact_accuracy:7.1%} "
                     f"{each.divergence:9.5f}")
    return lines
