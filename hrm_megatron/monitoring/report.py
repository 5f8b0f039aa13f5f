"""A self-contained HTML report of a run: no scripts, no network, embedded pictures. Needs matplotlib."""
from __future__ import annotations

import base64
import html
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hrm_megatron.config import ConfigError
from hrm_megatron.monitoring.picture import draw
from hrm_megatron.monitoring.run_folder import RunFolder, Save
from hrm_megatron.monitoring.scalars import LOSS, Curve, Log
from hrm_megatron.monitoring.status import Progress, evaluations, last, tasks_of
from hrm_megatron.training.console_lines import duration, thousands

# Shown first; all other settings are folded below.
SETTINGS = ("model_kind", "hrm_preset", "num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size",
            "padded_vocab_size", "h_cycles", "l_cycles", "bp_min_steps", "bp_max_steps", "bp_warmup_fraction",
            "norm_placement", "seq_length", "global_batch_size", "micro_batch_size", "train_iters", "lr", "min_lr",
            "lr_warmup_iters", "weight_decay", "ema_decay", "clip_grad", "seed", "params_dtype", "world_size",
            "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size", "data_parallel_size",
            "data_path", "train_data_path", "valid_data_path", "sampled_data_path", "split")
EVALUATION_FILE = "evaluation/results.json"  # where tools/evaluate.py writes in docs/evaluation.md
STYLE = """body { font: 15px/1.5 system-ui, sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: .5em 0 1.5em } th, td { text-align: left; padding: .2em 1em .2em 0;
border-bottom: 1px solid #ddd; vertical-align: top } img { max-width: 100% } code { font-size: 90% }"""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
Rows = Iterable[Sequence[object]]


def report(run: RunFolder, log: Log, verified: Mapping[int, str]) -> str:
    """Return the page; `verified` maps steps to the result of reading the bytes of a save."""
    title, measured, curves = html.escape(run.name), tasks(run), log.curves()
    picture = base64.b64encode(draw({run.name: curves}, run.name)).decode()
    parts = [
        _section("Where it stands", _table((), [*standing(run, curves), *(("log", said) for said in log.damages())])),
        _section("Curves", f'<img alt="curves of the run" src="data:image/png;base64,{picture}">'),
        _section("Evaluation", _table(("part", "step", "loss", "accuracy", "exact"), _evaluations(curves))
                 + _table(("task, answered by the EMA", "step", "value", "best", "at step"), _live_tasks(curves))
                 + _table(("task", "metric", "value", "questions", "samples", "checkpoint"), measured)),
        _section("Checkpoints", _table(("step", "saved", "size", "files", "contents"), _saves(run.saves(), verified))),
        _section("Starts", _table(("begun", "first step", "last step"), starts(log))
                 + _table(("Slurm job", "nodes", "from step", "to step", "end"), _attempts(run))),
        _section("Settings", _table((), [(name, run.arguments[name]) for name in SETTINGS
                                          if run.arguments.get(name, "None") != "None"])
                 + _folded(f"all {len(run.arguments)}", _table((), run.arguments.items()))),
    ]
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n<style>{STYLE}</style></head>\n'
            f"<body><h1>{title}</h1>\n{''.join(parts)}</body></html>\n")


def standing(run: RunFolder, curves: Mapping[str, Curve]) -> list[tuple[str, object]]:
    """Return the rows of the overview."""
    rows: list[tuple[str, object]] = [("folder", run.folder.resolve())]
    if LOSS in curves:
        progress = Progress.of(curves[LOSS], run.train_iters)
        finite = [(value, step) for value, step in zip(curves[LOSS].values, curves[LOSS].steps, strict=True)
                  if math.isfinite(value)]
        best = min(finite, default=None)
        rows += [("last step", f"{progress.step:,}{f' of {progress.steps:,}' if progress.steps else ''}"),
                 ("logged", _date(progress.logged)), ("loss", f"{curves[LOSS].values[-1]:.4f}"),
                 ("lowest loss", f"{best[0]:.4f} at step {best[1]:,}" if best else "none is a finite number"),
                 ("a step takes", duration_of(progress.seconds_per_step))]
    for name, curve, spelled in (("exact accuracy", "exact accuracy", "{:.1%}"), ("MFU", "MFU", "{:.1%}"),
                                 ("tokens/s", "tokens per second", "{:,.0f}")):
        if (value := last(curves, curve)) is not None:
            rows.append((name, spelled.format(value)))
    steps = run.bad_steps()
    rows.append(("steps gone back from", ", ".join(map(str, steps)) or "none"))
    return rows


def duration_of(seconds: float | None) -> str:
    """Format the time of a step, which may be a fraction of a second."""
    return "?" if seconds is None else f"{seconds:.3g}s" if seconds < 10 else duration(seconds)


def starts(log: Log) -> list[tuple[str, int, int]]:
    """Return (begun, first step, last step) of each start that logged a step."""
    found = [file.curves[LOSS] for file in log.starts() if LOSS in file.curves]
    return [(_date(loss.times[0]), loss.steps[0], loss.steps[-1]) for loss in found]


def tasks(run: RunFolder) -> list[tuple[object, ...]]:
    """Return the results of tools/evaluate.py in the run's folder, if any, with the checkpoint of each."""
    file = run.folder / EVALUATION_FILE
    if not file.exists():
        return []
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        of = _measured(found["settings"], run)
        return [(name, metric, f"{value['value']:.1%}"
                 + ("" if value["stderr"] is None else f" ± {value['stderr']:.1%}"), int(task["questions"]),
                 int(task["samples"]), of)
                for name, task in found["tasks"].items() for metric, value in task["metrics"].items()]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{file}: not what tools/evaluate.py writes ({error}); move it away") from error


def _measured(settings: Mapping[str, Any], run: RunFolder) -> str:
    place = Path(settings["checkpoint"])
    own = run.checkpoints is not None and place.is_relative_to(run.checkpoints.resolve())
    of = f"iteration {settings['iteration']}, {settings['weights'] or 'weights of one kind'}"
    return of if own else f"{of}, of {place}"  # shown for the run's own checkpoint too, if it has moved


def _evaluations(curves: Mapping[str, Curve]) -> list[tuple[object, ...]]:
    return [(part, f"{step:,}", f"{values.get(LOSS, math.nan):.4f}",
             *(f"{values.get(metric, math.nan):.1%}" for metric in ("accuracy", "exact accuracy")))
            for part, step, values in evaluations(curves)]


def _live_tasks(curves: Mapping[str, Curve]) -> list[tuple[object, ...]]:
    found: list[tuple[object, ...]] = []
    for name, curve in tasks_of(curves).items():
        best = max(range(len(curve.steps)), key=lambda i: curve.values[i])
        found.append((name, f"{curve.steps[-1]:,}", f"{curve.values[-1]:.1%}", f"{curve.values[best]:.1%}",
                      f"{curve.steps[best]:,}"))
    return found


def _saves(saves: Sequence[Save], verified: Mapping[int, str]) -> list[tuple[object, ...]]:
    return [(f"{save.step:,}", _date(save.seconds), f"{thousands(save.size_bytes)}B",
             save.state.replace(f"{save.folder}/", ""), verified.get(save.step, "not read")) for save in saves]


def _attempts(run: RunFolder) -> list[tuple[object, ...]]:
    return [(f"{one.job}.{one.restart}", " ".join(one.nodes), one.first_step, one.last_step,
             f"{one.end}{f': {one.why}' if one.why else ''}") for one in run.attempts()]


def _date(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S %Z", time.localtime(seconds))


def _section(title: str, content: str) -> str:
    return f"<h2>{html.escape(title)}</h2>\n{content or '<p>none</p>'}\n"


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{html.escape(title)}</summary>{content}</details>" if content else ""


def _table(columns: Sequence[str], rows: Rows) -> str:
    """Return a table, or "" if there are no rows."""
    lines = ["<tr>" + "".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows]
    head = "<tr>" + "".join(f"<th>{html.escape(column)}</th>" for column in columns) + "</tr>" if columns else ""
    return f"<table>{head}{''.join(lines)}</table>" if lines else ""
