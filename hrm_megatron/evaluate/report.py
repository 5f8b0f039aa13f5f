"""Report results as Markdown, JSON and a picture, next to those published for XL."""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hrm_megatron.config import ConfigError
from hrm_megatron.data.write_report import WITHOUT_PICTURE, can_draw
from hrm_megatron.evaluate.summary import Estimate, Result
from hrm_megatron.evaluate.tasks import TASKS, Task, with_shots
from hrm_megatron.generate.answer_file import check_same
from hrm_megatron.program import whole_file, write_aside

PUBLISHED = "published for HRM-Text XL (arXiv 2605.20613), not measured here"
RESULTS_FILE = "results.json"
OF_A_TASK = ("max_new_tokens", "stop", "logprobs")  # a session has defaults, but each task has its own


def percent(estimate: Estimate) -> str:
    error = "" if estimate.stderr is None else f" ± {100 * estimate.stderr:.1f}"
    return f"{100 * estimate.value:.1f}{error}"


def of_all_tasks(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return a session's identity without the settings that each task has of its own."""
    return {name: value for name, value in identity.items() if name not in OF_A_TASK}


def how_answered(settings: Mapping[str, Any]) -> str:
    """Return a sentence about the weights and the settings of the answers."""
    of = (f"{settings['weights']}, iteration {settings['iteration']}" if settings["weights"] else
          "of one kind, the folder does not say which")
    samples, chosen = settings["samples"], settings["sampling"]
    how = (f"{f'the majority of {samples} answers' if samples > 1 else 'answers'} at temperature "
           f"{chosen['temperature']:g}, top-p {chosen['top_p']:g}, seed {chosen['seed']}" if chosen["temperature"] else
           "greedy answers")
    cycles = [f"{settings[name]} {name[0].upper()} cycles" for name in ("h_cycles", "l_cycles") if settings[name]]
    ending = "" if settings["exit_threshold"] is None else f", exit below {settings['exit_threshold']:g}"
    return f"Weights: {of}, {settings['dtype']}; {how}; {' x '.join(cycles) or 'cycles as in training'}{ending}."


def markdown(results: Sequence[Result], identity: Mapping[str, Any]) -> str:
    lines = [f"# Evaluation of {identity['checkpoint']}", "",
             f"{how_answered(identity)} Percent ± standard error. The last column was {PUBLISHED}.", "",
             "| task | metric | this model | questions | condition | shots | context | invalid | too long | XL, "
             "published |", "|---|---|---|---|---|---|---|---|---|---|"]
    for result in results:
        task = result.task
        shots = str(shots_of(task)) + (
            f", {task.fewer_shots} in {result.fewer_shots}" if result.fewer_shots else "")
        for number, (name, found) in enumerate(result.metrics.items()):
            published = f"{task.published:.1f}" if task.published is not None and not number else ""
            cells = (task.title, name, percent(found), result.questions, task.condition, shots, result.context_tokens,
                     result.invalid, result.too_long, published)
            lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", *remarks(results)]
    return "\n".join(lines).rstrip() + "\n"


def shots_of(task: Task) -> int:
    return len(task.fixed_shots) or task.shots


def remarks(results: Sequence[Result]) -> list[str]:
    """Return a line for each difference between a measurement and the published one."""
    found = []
    for result in results:
        task, reference = result.task, TASKS[result.task.name]
        if result.questions == result.limit:
            found.append(f"- {task.title}: only the first {result.limit} questions of the split.")
        if task.condition != reference.condition:
            found.append(f"- {task.title}: condition {task.condition or 'of no tag'}; the reference has "
                         f"{reference.condition}.")
        if shots_of(task) != shots_of(reference):
            found.append(f"- {task.title}: shots: {shots_of(task)}; the reference has {shots_of(reference)}.")
        if task.new_tokens != reference.new_tokens:
            found.append(f"- {task.title}: answers of at most {task.new_tokens} tokens; the reference has what the "
                         "context leaves room for.")
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
            fewer_shots=result.fewer_shots, unended=result.unended, limit=result.limit, condition=task.condition,
            shots=shots_of(task), context_tokens=result.context_tokens, max_new_tokens=task.new_tokens,
            published_for_xl=None if task.published is None else task.published / 100)
    return dict(settings=of_all_tasks(identity), published=PUBLISHED, tasks=made)


def earlier_results(folder: Path, identity: Mapping[str, Any], tasks: Sequence[Task]) -> list[Result]:
    """Return the results of other tasks in the folder's results.json; raises ConfigError if its settings differ."""
    path = folder / RESULTS_FILE
    if not path.exists():
        return []
    new = {task.name for task in tasks}
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        found = [_result(name, made) for name, made in known["tasks"].items() if name not in new]
        before = dict(known["settings"])
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{path}: not what this version writes ({error!r}); move it away, and ask for all of its "
                          "tasks again: answers that are there are kept") from error
    if found:
        check_same(before, json.loads(json.dumps(of_all_tasks(identity))), path,
                   f", choose another --output, or move it away: {found[0].task.title} would fall out of it")
    return found


def _result(name: str, made: Mapping[str, Any]) -> Result:
    """Return the Result of an entry of `as_json`."""
    task = TASKS[name] if made["shots"] == shots_of(TASKS[name]) else with_shots(TASKS[name], made["shots"])
    metrics, groups = ({each: Estimate(**value) for each, value in made[part].items()}
                       for part in ("metrics", "groups"))
    return Result(replace(task, condition=made["condition"], new_tokens=made["max_new_tokens"]), metrics, groups,
                  *(made[part] for part in ("questions", "samples", "invalid", "too_long", "fewer_shots", "unended",
                                            "context_tokens", "limit")))


def write_reports(results: Sequence[Result], identity: Mapping[str, Any], folder: Path) -> list[str]:
    """Write results.json, results.md and, with matplotlib, results.png; return lines that name them."""
    draws = can_draw()
    names = [RESULTS_FILE, "results.md"] + ["results.png"] * draws
    write_aside(folder / RESULTS_FILE, json.dumps(as_json(results, identity), indent=1) + "\n")
    write_aside(folder / "results.md", markdown(results, identity))
    if draws:
        from hrm_megatron.evaluate.picture import draw_results
        with whole_file(folder / "results.png") as partial:
            otherwise = "\nMeasured otherwise than published, see results.md" if remarks(results) else ""
            draw_results(results, PUBLISHED, how_answered(identity) + otherwise, partial)
    else:
        (folder / "results.png").unlink(missing_ok=True)  # left by an earlier run
    said = f"results: {', '.join(str(folder / name) for name in names)}"
    return [said] if draws else [said, WITHOUT_PICTURE]
