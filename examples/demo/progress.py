"""Megatron's own lines during training, in short, with the time that is left."""
from __future__ import annotations

import re
import time
from collections.abc import Callable

NUMBER = r"([-+.\dEe]+|nan|inf)"
TRAINING = re.compile(rf" iteration +(\d+)/ *(\d+) .*elapsed time per iteration \(ms\): {NUMBER} .*"
                      rf"\| lm loss: {NUMBER} .*\| exact accuracy: {NUMBER} .*\| tokens per second: {NUMBER} ")
VALIDATION = re.compile(rf"validation loss at iteration (\d+) .*\| lm loss value: {NUMBER} .*"
                        rf"\| exact accuracy value: {NUMBER} ")
SAVED = re.compile(r"successfully saved checkpoint from iteration +(\d+) to (\S+)")
LOADED = re.compile(r"successfully loaded checkpoint from (\S+) .*at iteration (\d+)")


class TrainingProgress:
    """Make a short line of each line of Megatron's that says how training goes; of the others, None."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.first: tuple[int, float] | None = None  # step, when it was reported

    def __call__(self, line: str) -> str | None:
        if found := TRAINING.search(line):
            step, steps = int(found[1]), int(found[2])
            seconds_per_step = self._seconds_per_step(step) or float(found[3]) / 1000
            return (f"step {step:4}/{steps}: loss {float(found[4]):.3f}, {float(found[5]):6.1%} exact, "
                    f"{float(found[6]):,.0f} tokens/s, {minutes((steps - step) * seconds_per_step)} left")
        if found := VALIDATION.search(line):
            return (f"step {int(found[1]):4} validation: loss {float(found[2]):.3f}, {float(found[3]):6.1%} exact on "
                    "unseen questions")
        if found := SAVED.search(line):
            return f"step {int(found[1]):4} saved to {found[2]}"
        if found := LOADED.search(line):
            return f"step {int(found[2]):4} loaded from {found[1]}"
        return None

    def _seconds_per_step(self, step: int) -> float:
        """Mean since the first report, validation and all; 0 before there is one."""
        now = self.clock()
        self.first = self.first or (step, now)
        steps, seconds = step - self.first[0], now - self.first[1]
        return seconds / steps if steps else 0.0


def minutes(seconds: float) -> str:
    """Spell a time as m:ss."""
    return f"{round(seconds) // 60}:{round(seconds) % 60:02}"
