"""Draw loss and exact accuracy of every architecture against FLOPs; bars are the standard error over seeds."""
from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from hrm_megatron.model_types import MODEL_TYPES
from hrm_megatron.monitoring.picture import as_png


def draw(models: Mapping[str, Sequence[Mapping[str, Any]]]) -> bytes:
    """Return a PNG of the runs of each model, one run per seed."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, name, factor, label in zip(figure.subplots(1, 2), ("loss", "exact"), (1, 100), (
            "validation loss per token (nats)", "exactly right validation questions (%)"), strict=True):
        for model, runs in models.items():
            points = [*zip(*(run[name] for run in runs), strict=True)]
            flops = [statistics.fmean(values) for values in zip(*(run["flops"] for run in runs), strict=True)]
            axes.errorbar(flops, [factor * statistics.fmean(values) for values in points],
                          [factor * np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0.0
                           for values in points], label=MODEL_TYPES[model].title, marker=".", capsize=2)
        axes.set_xlabel("FLOPs of training")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return as_png(figure)
