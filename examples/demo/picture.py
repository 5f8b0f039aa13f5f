"""Draw the curves of a run from its TensorBoard log."""
from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hrm_megatron.monitoring.picture import running_mean
from hrm_megatron.monitoring.scalars import Curve, Log
from hrm_megatron.program import whole_file

SHARE_OF_STEPS = 0.02  # window of the running mean of the training curves
BLUE, ORANGE, GREY = "#1f77b4", "#d95f02", "#888888"


def draw(log_folder: Path, resumed_after: int, constant_accuracy: float, path: Path) -> None:
    """Draw training and validation loss and exact accuracy over the steps, and where the run was resumed."""
    curves = Log(log_folder).curves()
    figure = Figure(figsize=(9, 7), layout="constrained")
    loss, exact = figure.subplots(2, 1, sharex=True)
    for axes, name, factor in ((loss, "lm loss", 1.0), (exact, "exact accuracy", 100.0)):
        _plot(axes, curves[name], curves[f"{name} validation"], factor)
        axes.axvline(resumed_after, color=GREY, linestyle=":", label=f"stopped and resumed after step {resumed_after}")
        axes.grid(alpha=0.3)
    exact.axhline(100 * constant_accuracy, color=GREY, linestyle="--", label="best constant answer per module")
    loss.set_ylabel("loss per token (nats)")
    loss.set_ylim(bottom=0)
    exact.set_ylabel("exactly right answers (%)")
    exact.set_ylim(0, 100)
    exact.set_xlabel("optimizer step")
    loss.legend(loc="upper right")
    exact.legend(loc="upper left")
    loss.set_title("HRM on arithmetic questions: training and held-out validation")
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=120)


def _plot(axes: Axes, training: Curve, validation: Curve, factor: float) -> None:
    values = [factor * value for value in training.values]
    width = max(1, round(SHARE_OF_STEPS * len(values)))
    axes.plot(training.steps, values, color=BLUE, alpha=0.25)
    axes.plot(training.steps, running_mean(values, width), color=BLUE,
              label=f"training, mean of {width} steps" if width > 1 else "training")
    axes.plot(validation.steps, [factor * value for value in validation.values], "o-", color=ORANGE,
              label="validation (unseen questions)")
