"""Draw the curves of one run or several. Needs matplotlib, which is optional."""
from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hrm_megatron.config import ConfigError
from hrm_megatron.monitoring.scalars import Curve, in_groups
from hrm_megatron.monitoring.status import OF_TASKS, tasks_of

Curves = Mapping[str, Curve]
SHARE_OF_STEPS = 0.02  # window of the running mean of noisy curves
MARKERS = {" validation": "o", " validation EMA": "^", " test": "s", " test EMA": "v"}
COLOURS, GROUP_COLOURS = "tab10", "viridis"
WIDTH, HEIGHT = 6.0, 3.2  # of a panel, in inches
PANELS_IN_A_ROW = 2


class Panel(NamedTuple):
    """One panel: a curve of all runs, or a group of curves of one run, by tick or by source."""

    title: str
    curve: str = ""
    group: Sequence[str] = ()
    run: str = ""
    smooth: bool = False
    percent: bool = False
    logarithmic: bool = False


ONE_CURVE = (
    Panel("loss per token (nats)", "lm loss", smooth=True),
    Panel("exactly right examples (%)", "exact accuracy", smooth=True, percent=True),
    Panel("bp_steps, ticks with gradient", "bp steps"),
    Panel("learning rate", "learning-rate"),
    Panel("norm of the gradients", "grad-norm", smooth=True, logarithmic=True),
    Panel("update, relative to weights", "update/relative to weights", logarithmic=True),
    Panel("distance of the EMA, relative to weights", "EMA/relative distance", logarithmic=True),
    Panel("tokens/s", "tokens per second", smooth=True),
    Panel("MFU (%)", "MFU", percent=True),
    Panel("allocated device memory, peak (bytes)", "mem-max-allocated-bytes"),
    Panel("seconds of a save", "seconds of save"),
)
GROUPS = {"loss by source": "loss per token by source (nats)",
          "residual RMS": "RMS of the residual stream before the exit norm", "state RMS": "RMS of z_H and z_L"}


def panels(runs: Mapping[str, Curves]) -> list[Panel]:
    """Return the panels for which there is data."""
    logged = {name for curves in runs.values() for name in curves}
    found = [panel for panel in ONE_CURVE if not logged.isdisjoint(names_of(panel))]
    groups = [(title, run, in_groups(curves, [prefix])) for prefix, title in GROUPS.items()
              for run, curves in runs.items()]
    groups += [("tasks, answered by the EMA (share)", run, [f"{name}{OF_TASKS}" for name in tasks_of(curves)])
               for run, curves in runs.items()]
    return found + [Panel(f"{title}{f', {run}' if len(runs) > 1 else ''}", group=names, run=run)
                    for title, run, names in groups if names]


def names_of(panel: Panel) -> list[str]:
    """Return the names of a panel's curves, including those of held-out parts."""
    return [*panel.group] or [panel.curve, *(panel.curve + suffix for suffix in MARKERS)]


def draw(runs: Mapping[str, Curves], title: str) -> bytes:
    """Return a PNG of all curves of these runs; raises ConfigError if there are none."""
    if not (chosen := panels(runs)):
        raise ConfigError(f"{', '.join(runs)}: no curve in the log that is drawn; train for longer, or with a smaller "
                          "--tensorboard-log-interval")
    rows = -(-len(chosen) // PANELS_IN_A_ROW)
    figure = Figure(figsize=(WIDTH * PANELS_IN_A_ROW, HEIGHT * rows + 0.4), layout="constrained")
    figure.suptitle(title, parse_math=False)
    axes = figure.subplots(rows, PANELS_IN_A_ROW, squeeze=False).flatten()
    for each, panel in zip(axes, chosen, strict=False):
        draw_panel(each, panel, runs)
    for each in axes[len(chosen):]:
        each.set_axis_off()
    return as_png(figure)


def draw_panel(axes: Axes, panel: Panel, runs: Mapping[str, Curves]) -> None:
    """Draw one panel."""
    if panel.group:
        _draw_group(axes, panel.group, runs[panel.run])
    else:
        for number, (run, curves) in enumerate(runs.items()):
            colour = colormaps[COLOURS](number % 10)
            _draw_curve(axes, panel, curves, colour, run if len(runs) > 1 else "")
    axes.set_title(panel.title, fontsize="medium", parse_math=False)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if panel.logarithmic and any((np.asarray(line.get_ydata()) > 0).any() for line in axes.lines):
        axes.set_yscale("log")
    if missing := missing_steps(panel, runs):
        axes.plot(missing, [0.03] * len(missing), "x", color="red", transform=axes.get_xaxis_transform(),
                  label="not a finite number")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small", ncols=2 if panel.group else 1)


def missing_steps(panel: Panel, runs: Mapping[str, Curves]) -> list[int]:
    """Return the steps at which a curve of this panel is NaN or infinite, which lines do not show."""
    shown = [curves[name] for run, curves in runs.items() if panel.run in ("", run) for name in names_of(panel)
             if name in curves]
    return sorted({step for curve in shown for step, value in zip(curve.steps, curve.values, strict=True)
                   if not math.isfinite(value)})


def _draw_curve(axes: Axes, panel: Panel, curves: Curves, colour: tuple[float, ...], run: str) -> None:
    factor = 100.0 if panel.percent else 1.0
    if (curve := curves.get(panel.curve)) is not None:
        values = [factor * value for value in curve.values]
        width = max(1, round(SHARE_OF_STEPS * len(values))) if panel.smooth else 1
        if width > 1:
            axes.plot(curve.steps, values, color=colour, alpha=0.25)
        axes.plot(curve.steps, running_mean(values, width), marker=_mark(curve), color=colour,
                  label=f"{run} training, mean of {width} steps".strip() if width > 1 else run or None)
    for suffix, mark in MARKERS.items():
        if (curve := curves.get(panel.curve + suffix)) is not None:
            axes.plot(curve.steps, [factor * value for value in curve.values], marker=mark, linestyle="--",
                      color=colour, markersize=4, label=f"{run}{suffix}".strip())


def _draw_group(axes: Axes, names: Sequence[str], curves: Curves) -> None:
    for number, name in enumerate(names):
        colour = colormaps[GROUP_COLOURS](0.9 * number / max(1, len(names) - 1))
        curve = curves[name]
        axes.plot(curve.steps, curve.values, marker=_mark(curve), color=colour,
                  linestyle="--" if name.endswith("z_H") else "-",
                  label=(name.partition("/")[2] or name).removesuffix(OF_TASKS))
    axes.set_ylim(bottom=0)  # after an exit norm all are 1: do not magnify rounding


def _mark(curve: Curve) -> str:
    return "." if len(curve.steps) == 1 else ""  # a line through one point is invisible


def running_mean(values: Sequence[float], width: int) -> list[float]:
    """Return the mean of each value and up to `width` - 1 values before it."""
    sums = np.convolve(values, np.ones(width))[:len(values)]
    return [float(mean) for mean in sums / np.minimum(np.arange(1, len(values) + 1), width)]


def as_png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    return file.getvalue()
