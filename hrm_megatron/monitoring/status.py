"""The state of a run that the dashboard and the report show besides curves."""
from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hrm_megatron.monitoring.scalars import LOSS, Curve

BLOCKS, CROSS = "▁▂▃▄▅▆▇█", "×"
OF_TASKS = " tasks EMA"  # evaluate/live_tasks.py
LAST_STEPS = 50  # whose median time predicts the remaining time


@dataclass(frozen=True)
class Progress:
    """The last logged step, of `steps` in all (None: unknown), the time it was logged, and the current seconds per
    step."""

    step: int
    steps: int | None
    logged: float
    seconds_per_step: float | None

    @classmethod
    def of(cls, loss: Curve, steps: int | None) -> Progress:
        """Return the progress from the times of the losses; the median ignores pauses for saves, evaluations and
        restarts."""
        recent = [*zip(loss.steps, loss.times, strict=True)][-LAST_STEPS:]
        paces = [(time - before) / (step - earlier) for (earlier, before), (step, time) in
                 itertools.pairwise(recent) if time > before]
        return cls(loss.steps[-1], steps, loss.times[-1], statistics.median(paces) if paces else None)

    @property
    def done(self) -> bool:
        return self.steps is not None and self.step >= self.steps

    @property
    def seconds_left(self) -> float | None:
        """Seconds to the last step at the current pace; None if unknown."""
        if self.steps is None or self.seconds_per_step is None:
            return None
        return max(0, self.steps - self.step) * self.seconds_per_step


def sparkline(values: Sequence[float], width: int) -> str:
    """Return values as a line of at most `width` block characters; if there are more values, means of neighbours.

    A cross marks NaN or infinity.
    """
    count = min(width, len(values))
    means = [statistics.fmean(values[i * len(values) // count:(i + 1) * len(values) // count]) for i in range(count)]
    finite = [mean for mean in means if math.isfinite(mean)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    return "".join(CROSS if not math.isfinite(mean) else
                   BLOCKS[round((mean - low) / (high - low) * (len(BLOCKS) - 1)) if high > low else 0]
                   for mean in means)


def last(curves: Mapping[str, Curve], name: str) -> float | None:
    """Return the last value of a curve, None if there is no such curve."""
    return curves[name].values[-1] if name in curves else None


def tasks_of(curves: Mapping[str, Curve]) -> dict[str, Curve]:
    """Return the scores of `--eval-tasks` by task and metric, as in `gsm8k acc`."""
    return {name.removesuffix(OF_TASKS): curve for name, curve in curves.items()
            if name.endswith(OF_TASKS) and not name.endswith(f" stderr{OF_TASKS}")}


def evaluations(curves: Mapping[str, Curve]) -> list[tuple[str, int, dict[str, float]]]:
    """Return the last evaluation of each held-out part: name, step, and values by metric."""
    found = []
    for part in ("validation", "validation EMA", "test", "test EMA"):
        values = {metric: curves[f"{metric} {part}"] for metric in (LOSS, "accuracy", "exact accuracy")
                  if f"{metric} {part}" in curves}
        if values:
            step = max(curve.steps[-1] for curve in values.values())
            found.append((part, step, {metric: curve.values[-1] for metric, curve in values.items()}))
    return found
