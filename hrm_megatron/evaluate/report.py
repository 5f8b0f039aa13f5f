"""Results as Markdown, JSON and a picture, beside the row that was published for XL."""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hrm_megatron.data.write_report import WITHOUT_PICTURE, can_draw
from hrm_megatron.evaluate.summary import Estimate, Result
from hrm_megatron.program import whole_file, write_aside

PUBLISHED = "published for HRM-Text XL (arXiv 2605.20613), not measured here"


def percent(estimate: Estimate) -> str:
    error = "" if estimate.stderr is None else f" ± {100 * estimate.stderr:.1f}"
    return f"{100 * estimate.value:.1f}{error}"


def markdown(results: Sequence[Result], identity: Mapping[str, Any]) -> str:
    of = (f"{identity['weights']}, iteration {identity['iteration']}" if identity["weights"] else
          "of one kind, the folder does not say which")
    lines = [f"# Evaluation of {identity['checkpoint']}", "",
             f"Weights: {of}, {identity['dtype']}. Percent ± "
             f"standard error. The last column was {PUBLISHED}.", "",
             "| task | metric | this model | questions | condition | shots | context | invalid | too long | XL, "
             "published |", "|---|---|---|---|---|---|---|---|---|---|"]
    for result in results:
        task = result.task
        shots = str(len(task.fixed_shots) or task.shots) + (
            f", {task.fewer_shots} in {result.fewer_shots}" if result.fewer_shots else "")
        for number, (name, found) in enumerate(result.metrics.items()):
            published = f"{task.published:.1f}" if task.published is not None and not number else ""
            cells = (task.title, name, percent(found), result.questions, task.condition, shots, result.context_tokens,
                     result.invalid, result.too_long, published)
            lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", *remarks(results)]
    return "\n".join(lines).rstrip() + "\n"


def remarks(results: Sequence[Result]) -> list[str]:
    """Say what makes a figure another measurement than the published one."""
    found = []
    for result in results:
        task = result.task
        if result.context_tokens < task.context_tokens:
            found.append(f"- {task.title}: context of {result.context_tokens}, the model's; the reference has "
                         f"{task.context_tokens}.")
        if result.too_long:
            found.append(f"- {task.title}: {result.too_long} prompts do not fit the context; each counts as an invalid "
                         "answer.")
        if result.unended:
            found.append(f"- {task.title}: {result.unended} answers were cut off before their end.")
    return found


def as_json(results: Sequence[Result], identity: Mapping[str, Any]) -> dict[str, Any]:
    made = {}
    for result in results:
        task = result.task
        made[task.name] = dict(
            metrics={name: asdict(found) for name, found in result.metrics.items()},
            groups={name: asdict(found) for name, found in result.groups.items()},
            questions=result.questions, samples=result.samples, invalid=result.invalid, too_long=result.too_long,
            fewer_shots=result.fewer_shots, unended=result.unended, condition=task.condition,
            shots=len(task.fixed_shots) or task.shots, context_tokens=result.context_tokens,
            published_for_xl=None if task.published is None else task.published / 100)
    return dict(settings=dict(identity), published=PUBLISHED, tasks=made)


def write_reports(results: Sequence[Result], identity: Mapping[str, Any], folder: Path) -> list[str]:
    """Write results.json, results.md and, where matplotlib is, results.png; return lines that say so."""
    draws = can_draw()
    names = ["results.json", "results.md"] + ["results.png"] * draws
    write_aside(folder / "results.json", json.dumps(as_json(results, identity), indent=1) + "\n")
    write_aside(folder / "results.md", markdown(results, identity))
    if draws:
        from hrm_megatron.evaluate.picture import draw_results
        with whole_file(folder / "results.png") as partial:
            draw_results(results, PUBLISHED, partial)
    else:
        (folder / "results.png").unlink(missing_ok=True)  # of an earlier run
    said = f"results: {', '.join(str(folder / name) for name in names)}"
    return [said] if draws else [said, WITHOUT_PICTURE]
