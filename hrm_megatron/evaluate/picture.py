"""Draw results as bars beside the published ones, and a sweep of depths as curves. Needs matplotlib, which is
optional."""
from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hrm_megatron.evaluate.summary import Result
from hrm_megatron.evaluate.sweep import Point

OURS, THEIRS = "#1f77b4", "#cccccc"
WIDTH = 0.4


def draw_results(results: Sequence[Result], published: str, title: str, path: Path) -> None:
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
    figure.suptitle(title, fontsize="small", wrap=True)
    figure.legend(loc="outside lower center", fontsize="small")
    figure.savefig(path, dpi=110)


def draw_sweep(points: Sequence[Point], answers: int, title: str) -> bytes:
    """Return a PNG of accuracy with its standard error against H cycles and against time; the first point is the depth
    of training."""
    figure = Figure(figsize=(10, 4.5), layout="constrained")
    by_cycles, by_time = figure.subplots(1, 2, sharey=True)

    def line(axes: Axes, some: Sequence[Point], x: Callable[[Point], float], place: int, style: str,
             label: str) -> None:
        some = sorted(some, key=x)
        axes.errorbar([x(point) for point in some], [100 * point.accuracy.value for point in some],
                      [100 * (point.accuracy.stderr or 0) for point in some], marker="o", capsize=3, linestyle=style,
                      color=f"C{place}", label=label)

    def cycles(point: Point) -> float:
        return point.mean_h_cycles

    def milliseconds(point: Point) -> float:
        return 1e3 * point.seconds / answers
    inner = sorted({point.depth.l_cycles for point in points})
    for axes, x in ((by_cycles, cycles), (by_time, milliseconds)):
        for place, l_cycles in enumerate(inner):
            own = [point for point in points if point.depth.l_cycles == l_cycles]
            line(axes, [point for point in own if point.depth.exit_threshold is None], x, place, "-",
                 f"L cycles {l_cycles}")
            if exits := [point for point in own if point.depth.exit_threshold is not None]:
                line(axes, exits, x, place, ":", f"L cycles {l_cycles}, early exit")
        axes.plot(x(points[0]), 100 * points[0].accuracy.value, "k*", markersize=12, label="as in training", zorder=3)
    by_cycles.set(xlabel="H cycles run, mean over answers", ylabel="accuracy, percent", title=title)
    by_time.set(xlabel="ms per answer")
    figure.legend(*by_time.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize="small")
    file = io.BytesIO()
    figure.savefig(file, dpi=110)
    return file.getvalue()
