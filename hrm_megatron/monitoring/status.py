"""Where a run stands: what the dashboard and the report say beside curves."""
from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hrm_megatron.monitoring.scalars import LOSS, Curve

BLOCKS, CROSS = "▁▂▃▄▅▆▇█", "×"
OF_TASKS = " tasks EMA"  # evaluate/live_tasks.py
LAST_STEPS = 50  # whose median time tells how long the rest takes


@dataclass(frozen=True)
class Progress:
    """The last logged step of `steps` (None: unknown), when it was logged, and the seconds that a step takes now."""

    step: int
    steps: int | None
    logged: float
    seconds_per_step: float | None

    @classmethod
    def of(cls, loss: Curve, steps: int | None) -> Progress:
        """Read it off the times of the losses; pauses of saves, evaluations and restarts are not the median."""
        recent = [*zip(loss.steps, loss.times, strict=True)][-LAST_STEPS:]
        paces = [(time - before) / (step - earlier) for (earlier, before), (step, time) in
                 itertools.pairwise(recent) if time > before]
        return cls(loss.steps[-1], steps, loss.times[-1], statistics.median(paces) if paces else None)

    @property
    def done(self) -> bool:
        return self.steps is not None and self.step >= self.steps

    @property
    def seconds_left(self) -> float | None:
        """Time to the last step at the pace of now; None where nobody can know."""
        if self.steps is None or self.seconds_per_step is None:
            return None
        return max(0, self.steps - self.step) * self.seconds_per_step


def sparkline(values: Sequence[float], width: int) -> str:
    """Draw values in one line of at most `width` characters; where there are more values, means of neighbours.

    Where one of them is NaN or infinite there is a cross.
    """
    count = min(width, len(values))
    means = [statistics.fmean(values[i * len(values) // count:(i + 1) * len(values) // count]) for i in range(count)]
    finite = [mean for mean in means if math.isfinite(mean)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    return "".join(CROSS if not math.isfinite(mean) else
                   BLOCKS[round((mean - low) / (high - low) * (len(BLOCKS) - 1)) if high > low else 0]
                   for mean in means)


def last(curves: Mapping[str, Curve], name: str) -> float | None:
    """The last value of a curve, None if it has none."""
    return curves[name].values[-1] if name in curves else None


def tasks_of(curves: Mapping[str, Curve]) -> dict[str, Curve]:
    """Return the scores of `--eval-tasks` by task and metric, as in `gsm8k acc`."""
    return {name.removesuffix(OF_TASKS): curve for name, curve in curves.items()
            if name.endswith(OF_TASKS) and not name.endswith(f" stderr{OF_TASKS}")}


def evaluations(curves: Mapping[str, Curve]) -> list[tuple[str, int, dict[str, float]]]:
    """List the last evaluation of each held-out part: its name, its step, and values by metric."""
    found = []
    for part in ("validation", "validation EMA", "test", "test EMA"):
        values = {metric: curves[f"{metric} {part}"] for metric in (LOSS, "accuracy", "exact accuracy")
                  if f"{metric} {part}" in curves}
        if values:
            step = max(curve.steps[-1] for curve in values.values())
            found.append((part, step, {metric: curve.values[-1] for metric, curve in values.items()}))
    return found
