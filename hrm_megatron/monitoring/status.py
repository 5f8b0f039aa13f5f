"""Where a run stands: what the dashboard and the report say beside curves."""
from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hrm_megatron.monitoring.scalars import Curve

LOSS = "lm loss"
BLOCKS = "▁▂▃▄▅▆▇█"
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
    """Draw values in one line of at most `width` characters; where there are more values, means of neighbours."""
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return ""
    count = min(width, len(values))
    cut = [values[i * len(values) // count:(i + 1) * len(values) // count] for i in range(count)]
    means = [statistics.fmean(part) for part in cut]
    low, high = min(means), max(means)
    return "".join(BLOCKS[round((mean - low) / (high - low) * (len(BLOCKS) - 1)) if high > low else 0]
                   for mean in means)


def last(curves: Mapping[str, Curve], name: str) -> float | None:
    """The last value of a curve, None if it has none."""
    return curves[name].values[-1] if name in curves else None


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
