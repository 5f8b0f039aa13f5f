"""Answer the same questions at several depths: accuracy, H cycles run, and time."""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from hrm_megatron.config import ConfigError
from hrm_megatron.evaluate.ask import prepare, requests_of
from hrm_megatron.evaluate.report import of_all_tasks, percent
from hrm_megatron.evaluate.rows import PlacedItem
from hrm_megatron.evaluate.summary import Estimate, estimate
from hrm_megatron.evaluate.tasks import Task
from hrm_megatron.generate.engine import Request
from hrm_megatron.generate.questions import REFERENCE, check_text, of_jsonl
from hrm_megatron.generate.session import Session


@dataclass(frozen=True)
class Depth:
    """Cycles of an answer; with `exit_threshold`, `h_cycles` is the maximum."""

    h_cycles: int
    l_cycles: int
    exit_threshold: float | None = None

    @property
    def title(self) -> str:
        ending = "" if self.exit_threshold is None else f", exit below {self.exit_threshold:g}"
        return f"{self.h_cycles} H x {self.l_cycles} L cycles{ending}"


@dataclass(frozen=True)
class Point:
    """Results at a depth; `difference` is the mean of per-question differences to the depth of training."""

    depth: Depth
    accuracy: Estimate
    difference: Estimate
    mean_h_cycles: float  # over answers
    tokens: int  # of all answers
    seconds: float  # for all answers, best of the repetitions


@dataclass(frozen=True)
class Questions:
    """Requests (None: does not fit the context), and a function that `scores` the answering texts ("" for None). Scores
    are averaged by group first."""

    requests: Sequence[Request | None]
    groups: Sequence[str]
    scores: Callable[[Sequence[str]], list[float]]


def exact_questions(path: Path, condition: str, session: Session) -> Questions:
    """Return the questions of a jsonl file; an answer is right if it equals the row's response exactly."""
    questions = of_jsonl(path, condition, kept=False)
    for question in questions:
        if not isinstance(question.others.get(REFERENCE), str):
            raise ConfigError(f"{question.place}: no field 'response' with the right answer; give it as a string")
        check_text(f"{question.place}, response", question.others[REFERENCE])
    spelled = session.tokenizer.encode_responses([question.others[REFERENCE] for question in questions])
    right = [session.text(ids) for ids in spelled]  # normalized like an answer (composed characters)
    longest = max(map(len, spelled))  # anything longer is wrong anyway
    requests = [Request(request.prompt, longest, request.sampling, request.stop_tokens)
                for request in session.requests(questions)]
    return Questions(requests, [""] * len(right), lambda texts: [
        float(text == want) for text, want in zip(texts, right, strict=True)])


def task_questions(task: Task, rows: tuple[Sequence[PlacedItem], Sequence[PlacedItem]], session: Session) -> Questions:
    """Return the questions of a task of the reference; the score is its first metric."""
    context = min(task.context_tokens, session.decoder.context_tokens)
    asked = prepare(task, *rows, session.tokenizer, context)
    requests, groups = list(requests_of(task, asked, session, context)), [one.item.group for one in asked]
    return Questions(requests, groups, lambda texts: [
        task.answer(text, one.item).scores[0] for text, one in zip(texts, asked, strict=True)])


def sweep(sessions: Mapping[Depth, Session], questions: Questions, max_rows: int, repeats: int,
          clock: Callable[[], float], say: Callable[[str], object]) -> list[Point]:
    """Answer the questions with the session of each depth, `repeats` times in alternation; the first is the depth of
    training."""
    asked = [request for request in questions.requests if request]
    if not asked:
        raise ConfigError("no prompt fits the model's context; give shorter questions")
    # Warm-up: the first answers compile kernels and repack weights, which belongs to no depth.
    list(next(iter(sessions.values())).answer(asked[:max_rows], max_rows, lambda line: None))
    seconds: dict[Depth, float] = {}
    for repeat in range(repeats):
        found = []
        for depth, session in sessions.items():
            began = clock()
            found.append([samples[0] for samples in session.answer(asked, max_rows, lambda line: None)])
            seconds[depth] = min(seconds.get(depth, float("inf")), clock() - began)
            say(f"{depth.title}: {seconds[depth]:.1f} s ({repeat + 1} of {repeats})")
    points: list[Point] = []
    trained: list[float] = []
    for depth, answers in zip(sessions, found, strict=True):
        left = iter(answers)
        scores = questions.scores([next(left).text if request else "" for request in questions.requests])
        trained = trained or scores
        cycles = [answer.h_cycles or depth.h_cycles for answer in answers]
        points.append(Point(
            depth, estimate(scores, questions.groups),
            estimate([here - there for here, there in zip(scores, trained, strict=True)], questions.groups),
            fmean(cycles), sum(len(answer.tokens) for answer in answers), seconds[depth]))
    return points


def table(points: Sequence[Point], answers: int) -> str:
    """Return a Markdown table, one line per depth."""
    lines = ["| H cycles | L cycles | exit below | H cycles run | accuracy, % | to the first line | tokens | ms per "
             "answer | time |", "|---|---|---|---|---|---|---|---|---|"]
    for point in points:
        depth, moved = point.depth, point.difference
        cells = (depth.h_cycles, depth.l_cycles, "" if depth.exit_threshold is None else f"{depth.exit_threshold:g}",
                 f"{point.mean_h_cycles:.2f}", percent(point.accuracy), "" if point is points[0] else
                 f"{'+' if moved.value > 0 else ''}{percent(moved)}", point.tokens,
                 f"{1e3 * point.seconds / answers:.2f}", f"{point.seconds / points[0].seconds:.2f}")
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def as_json(points: Sequence[Point], identity: Mapping[str, Any], answers: int) -> dict[str, Any]:
    return dict(settings={name: value for name, value in of_all_tasks(identity).items()
                          if name not in vars(points[0].depth)},
                answers=answers, points=[dict(
                    vars(point.depth), mean_h_cycles=point.mean_h_cycles, accuracy=vars(point.accuracy),
                    difference=vars(point.difference), tokens=point.tokens, seconds=point.seconds) for point in points])
