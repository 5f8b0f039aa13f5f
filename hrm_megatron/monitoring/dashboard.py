"""Render one frame of the dashboard from the files of a run. Needs rich, which is optional."""
from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from hrm_megatron.monitoring.run_folder import WHOLE, RunFolder, Save
from hrm_megatron.monitoring.scalars import LOSS, Curve, Log, in_groups
from hrm_megatron.monitoring.status import Progress, evaluations, last, sparkline, tasks_of
from hrm_megatron.training.console_lines import duration, thousands

LAST_SAVES = 5
QUIET_STEPS, QUIET_INTERVALS = 10, 3  # longer without a line, in steps or in log intervals, is late
Curves = Mapping[str, Curve]


def frame(run: RunFolder, log: Log | None, now: float, width: int) -> RenderableType:
    """Render the state of the run at `now` (seconds since the epoch) in `width` columns."""
    parts: list[RenderableType] = []
    curves = log.curves() if log else {}
    if LOSS in curves:
        progress = Progress.of(curves[LOSS], run.train_iters)
        parts += [_progress(progress, now, width, run.steps_between_lines), _numbers(curves, width)]
    else:
        parts.append(Text(run.missing_log or "no step is logged yet"))
    if found := evaluations(curves):
        parts.append(_evaluations(found))
    if tasks := tasks_of(curves):
        parts.append(Text("tasks, answered by the EMA: " + ", ".join(
            f"{name} {curve.values[-1]:.1%} (step {curve.steps[-1]:,})" for name, curve in tasks.items())))
    saves = run.saves()
    parts += [_saves(saves, now)] if saves else []
    parts.append(_trouble(run))
    parts += [Text(damage, "yellow") for damage in (log.damages() if log else ())]
    return Panel(Group(*parts), title=Text(str(run.folder)), title_align="left", width=width)


def _progress(progress: Progress, now: float, width: int, steps_between: int) -> RenderableType:
    silence = max(0, now - progress.logged)  # the clock of the run's machine may be ahead
    line = Text(f"step {progress.step:,}{f' of {progress.steps:,}' if progress.steps else ''}", "bold")
    if progress.done:
        line.append(", done", "green")
    else:
        line.append(f", {duration(progress.seconds_left)} left" if progress.steps else "", "default")
        quiet_steps = max(QUIET_STEPS, QUIET_INTERVALS * steps_between)
        late = progress.seconds_per_step is not None and silence > quiet_steps * progress.seconds_per_step
        line.append(f", last line {duration(silence)} ago", "bold red" if late else "default")
    if not progress.steps:
        return line
    bar = Table.grid()  # a bare bar has no line end
    bar.add_row(ProgressBar(progress.steps, min(progress.step, progress.steps), width=width - 4))
    return Group(line, bar)


def _numbers(curves: Curves, width: int) -> Table:
    table = Table.grid(padding=(0, 2))
    drawn = max(10, width - 40)
    for title, name, spelled in (
            ("loss", LOSS, "{:.4f}"), ("exact", "exact accuracy", "{:.1%}"), ("gradients", "grad-norm", "{:.3g}"),
            ("update / weights", "update/relative to weights", "{:.2e}"),
            ("EMA distance", "EMA/relative distance", "{:.2e}")):
        if (value := last(curves, name)) is not None:
            table.add_row(title, Text(spelled.format(value), "default" if math.isfinite(value) else "bold red"),
                          sparkline(curves[name].values, drawn))
    if (speed := last(curves, "tokens per second")) is not None:
        table.add_row("tokens/s", thousands(speed), sparkline(curves["tokens per second"].values, drawn))
    for title, name, spelled in (("MFU", "MFU", "{:.1%}"), ("bp_steps", "bp steps", "{:g}"),
                                 ("learning rate", "learning-rate", "{:.2e}")):
        if (value := last(curves, name)) is not None:
            table.add_row(title, spelled.format(value), "")
    if ticks := in_groups(curves, ["residual RMS"]):
        table.add_row("residual RMS", "", " ".join(f"{name[-1]} {curves[name].values[-1]:.3g}" for name in ticks))
    return table


def _evaluations(found: Sequence[tuple[str, int, dict[str, float]]]) -> Table:
    table = Table(title="evaluation", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("part", "step", "loss", "accuracy", "exact"):
        table.add_column(column)
    for part, step, values in found:
        cells = [values.get(metric, math.nan) for metric in (LOSS, "accuracy", "exact accuracy")]
        table.add_row(part, f"{step:,}", f"{cells[0]:.4f}", f"{cells[1]:.1%}", f"{cells[2]:.1%}")
    return table


def _saves(saves: Sequence[Save], now: float) -> Table:
    table = Table(title="saves", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for column in ("step", "age", "size", "files"):
        table.add_column(column)
    for save in saves[-LAST_SAVES:]:
        table.add_row(f"{save.step:,}", duration(max(0, now - save.seconds)), f"{thousands(save.size_bytes)}B",
                      Text(save.state.replace(f"{save.folder}/", ""), "green" if save.state == WHOLE else "yellow",
                           overflow="ellipsis", no_wrap=True))
    return table


def _trouble(run: RunFolder) -> Text:
    steps, attempts = run.bad_steps(), run.attempts()
    line = Text(f"starts: {run.starts()}; bad steps: {', '.join(map(str, steps)) or 'none'}",
                "yellow" if steps else "default")
    if attempts:
        one = attempts[-1]
        line.append(f"; Slurm: attempt {len(attempts)}, {one.end}{f' ({one.why})' if one.why else ''}")
    return line
