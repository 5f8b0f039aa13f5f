"""Results as bars beside the published ones. Needs matplotlib, which is optional."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from hrm_megatron.evaluate.summary import Result

OURS, THEIRS = "#1f77b4", "#cccccc"
WIDTH = 0.4


def draw_results(results: Sequence[Result], published: str, path: Path) -> None:
    """Draw the first metric of each task with its standard error."""
    figure = Figure(figsize=(max(5, 1.2 * len(results)), 4), layout="constrained")
    axes = figure.subplots()
    firsts = [next(iter(result.metrics.items())) for result in results]
    axes.bar([i - WIDTH / 2 for i in range(len(results))], [100 * found.value for _, found in firsts], WIDTH,
             yerr=[100 * (found.stderr or 0) for _, found in firsts], capsize=3, color=OURS, label="this model")
    known = [(i, result.task.published) for i, result in enumerate(results) if result.task.published is not None]
    if known:
        axes.bar([i + WIDTH / 2 for i, _ in known], [value for _, value in known], WIDTH, color=THEIRS, hatch="//",
                 edgecolor="white", label=published)
    axes.set_xticks(range(len(results)), [f"{result.task.title}\n{name}" for result, (name, _)
                                          in zip(results, firsts, strict=True)], fontsize="small")
    axes.set_ylabel("percent")
    axes.set_ylim(0, 100)
    figure.legend(loc="outside lower center", fontsize="small")
    figure.savefig(path, dpi=110)
