"""The curves of a run as a picture, read from its TensorBoard log."""
from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

Curve = tuple[list[int], list[float]]  # steps, values
ALL_EVENTS = {"scalars": 0}  # 0: keep every one
SHARE_OF_STEPS = 0.02  # in the running mean of the training curves
BLUE, ORANGE, GREY = "#1f77b4", "#d95f02", "#888888"


def read_curves(log_folder: Path) -> dict[str, Curve]:
    """Read every scalar of the log, of all event files in the folder, by name; a step logged twice counts once."""
    events = EventAccumulator(str(log_folder), ALL_EVENTS)
    events.Reload()
    curves = {}
    for name in events.Tags()["scalars"]:
        values = {event.step: event.value for event in events.Scalars(name)}
        curves[name] = (sorted(values), [values[step] for step in sorted(values)])
    return curves


def running_mean(values: list[float], width: int) -> list[float]:
    """Mean of each value and the up to `width` - 1 before it."""
    windows = [values[max(0, i + 1 - width):i + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def draw(log_folder: Path, resumed_after: int, constant_accuracy: float, path: Path) -> None:
    """Draw training and validation loss and exact accuracy over the steps, and where the run was resumed."""
    curves = read_curves(log_folder)
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
    figure.savefig(path, dpi=120)


def _plot(axes: Axes, training: Curve, validation: Curve, factor: float) -> None:
    steps, values = training
    values = [factor * value for value in values]
    width = max(1, round(SHARE_OF_STEPS * len(values)))
    axes.plot(steps, values, color=BLUE, alpha=0.25)
    axes.plot(steps, running_mean(values, width), color=BLUE,
              label=f"training, mean of {width} steps" if width > 1 else "training")
    axes.plot(validation[0], [factor * value for value in validation[1]], "o-", color=ORANGE,
              label="validation (unseen questions)")
