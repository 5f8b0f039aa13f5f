"""The terminal lines of a run as plain text, and the estimate of the remaining time."""
from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

NO_TERMINAL_WIDTH = 120  # columns, for output to a file or a pipe
NARROWEST = 40
UNITS = (("d", 86_400), ("h", 3600), ("m", 60), ("s", 1))
# Order of the facts before step 1, by the word before their colon. Other facts come first.
FACTS = ("model", "layers", "weight gradients", "attention", "layout", "data", "validation", "checkpoint", "schedule",
         "log")


@dataclass(frozen=True)
class StepReport:
    """The values in a line about a training step: means over the steps since the previous line, and this step's
    learning rate.

    `seconds_left` is None while unknown; `tflops` are TFLOP/s per GPU, None unless --log-throughput is given.
    """

    step: int
    steps: int
    loss: float
    exact: float
    bp_steps: float
    lr: float
    tokens_per_second: float
    seconds_left: float | None
    tflops: float | None = None


def step_line(report: StepReport, width: int) -> str:
    """Return the line of a training step; on a narrow terminal with shorter labels, and then fewer fields."""
    roomy, short = _fields(report, roomy=True), _fields(report, roomy=False)
    if len(line := "  ".join(roomy.values())) <= width:
        return line
    for dropped in ("", "lr", "bp", "tflops", "speed", "exact", "left"):  # least informative first
        short.pop(dropped, None)
        if len(line := " ".join(short.values())) <= width:
            return line
    return line[:width]


def _fields(report: StepReport, roomy: bool) -> dict[str, str]:
    """Return fields by name; if `roomy`, with fixed widths, so that columns stay aligned."""
    digits = len(str(report.steps))
    place, left = f"{report.step:{digits}}/{report.steps}", duration(report.seconds_left)
    if roomy:
        cells = dict(step=f"step {place}", loss=f"loss {report.loss:7.4f}", exact=f"exact {report.exact:6.1%}",
                     bp=f"bp {report.bp_steps:<4.3g}", lr=f"lr {report.lr:8.2e}",
                     speed=f"{report.tokens_per_second:11,.0f} tokens/s", left=f"{left:>6} left")
        tflops = "TFLOP/s/GPU"
    else:
        cells = dict(step=place, loss=f"loss {_figures(report.loss)}", exact=f"exact {report.exact:.1%}",
                     bp=f"bp {report.bp_steps:.2g}", lr=f"lr {_tersely(report.lr)}",
                     speed=f"{thousands(report.tokens_per_second)} tok/s", left=f"{left} left")
        tflops = "TFLOP/s"
    if report.tflops is not None:
        last = cells.pop("left")
        cells |= dict(tflops=f"{report.tflops:.4g} {tflops}", left=last)
    return cells


def evaluation_line(step: int, steps: int, part: str, means: dict[str, float], seconds: float, width: int) -> str:
    """Return the line of an evaluation; `part` is validation or test."""
    scores = "  ".join(f"{name} {value:.1%}" for name, value in (
        ("accuracy", means["accuracy"]), ("exact", means["exact accuracy"])))
    return f"{_place(step, steps)}  {part}: loss {means['lm loss']:.4f}  {scores}  in {duration(seconds)}"[:width]


def saved_line(step: int, steps: int, folder: str, seconds: float, in_background: bool) -> str:
    """Return the line of a checkpoint that is saved, or being written; its path is never truncated."""
    done = (f"is being saved in the background, training waited {seconds:.1f} s" if in_background else
            f"saved in {duration(seconds)}")
    return f"{_place(step, steps)}  {done}: {folder}"


def _place(step: int, steps: int) -> str:
    return f"step {step:{len(str(steps))}}/{steps}"


def facts_block(facts: Iterable[str], width: int | None) -> str:
    """Return the facts in the order of FACTS, each wrapped to `width` columns (None: not) with a hanging indent."""
    def place(fact: str) -> int:
        topic = fact.partition(":")[0]
        return FACTS.index(topic) if topic in FACTS else -1
    lines = [line for fact in sorted(facts, key=place) for line in fact.splitlines()]
    if width is None:
        return "\n".join(lines)
    return "\n".join(piece for line in lines for piece in textwrap.wrap(
        line, max(width, NARROWEST), subsequent_indent="    ", break_long_words=False, break_on_hyphens=False))


def duration(seconds: float | None) -> str:
    """Format seconds by the two largest units: 45s, 3m20s, 1h05m, 2d03h."""
    if seconds is None or not math.isfinite(seconds):
        return "?"
    rest, found = round(seconds), ""
    for i, (unit, size) in enumerate(UNITS):
        if rest >= size or unit == "s":
            found = f"{rest // size}{unit}"
            if unit != "s":
                smaller, smaller_size = UNITS[i + 1]
                found += f"{rest % size // smaller_size:02}{smaller}"
            break
    return found


def thousands(value: float) -> str:
    """Format a rate with three significant digits: 987, 12.3k, 4.56M."""
    if not math.isfinite(value):
        return str(value)
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * size:
            return f"{_figures(value / size, 3)}{unit}"
    return f"{value:.0f}"


def _figures(value: float, figures: int = 4) -> str:
    """Format a number with `figures` significant digits, never with an exponent."""
    if not math.isfinite(value):
        return str(value)
    before = len(str(int(abs(float(f"{value:.{figures}g}")))))
    return f"{value:.{max(0, figures - before)}f}"


def _tersely(value: float) -> str:
    """Format a learning rate as 2.2e-4."""
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa}e{int(exponent)}" if value and exponent else f"{value:g}"


class TimeLeft:
    """Estimate the remaining time of a run from its speed so far and the relative costs of its steps."""

    def __init__(self, costs: Sequence[float], clock: Callable[[], float]) -> None:
        """`costs` of steps 1, 2, ... are in any unit."""
        self.done, self.clock = [0.0, *accumulate(costs)], clock
        self.first: tuple[int, float] | None = None

    def start(self, step: int) -> None:
        """Start measuring when `step` steps are done."""
        self.first = step, self.clock()

    def after(self, step: int) -> float | None:
        """Return the estimated seconds left once `step` is done, or None while unknown."""
        if self.first is None:
            return None
        begun, time = self.first
        spent = self.done[step] - self.done[begun]
        return (self.clock() - time) / spent * (self.done[-1] - self.done[step]) if spent else None
