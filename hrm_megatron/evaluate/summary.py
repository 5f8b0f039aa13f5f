"""Summarize answers as metrics with standard errors, and count invalid and truncated answers."""
from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import Any

from hrm_megatron.evaluate.tasks import TOO_LONG, Asked, Task
from hrm_megatron.evaluate.verdict import Verdict


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error (None: too few answers), as fractions of 1."""

    value: float
    stderr: float | None


@dataclass(frozen=True)
class Result:
    """The results of a task. The first of `metrics` is the published one. With several samples they score the majority
    vote, and NAME_mean is the mean over single answers."""

    task: Task
    metrics: Mapping[str, Estimate]
    groups: Mapping[str, Estimate]
    questions: int
    samples: int
    invalid: int
    too_long: int
    fewer_shots: int
    unended: int  # answers truncated by the context or --max-new-tokens
    context_tokens: int
    limit: int | None = None  # only this many questions of the split were used


def estimate(scores: Sequence[float], groups: Sequence[str]) -> Estimate:
    """Return the mean over the means of all groups, as in the reference, with the standard error propagated."""
    parts: dict[str, list[float]] = {}
    for score, group in zip(scores, groups, strict=True):
        parts.setdefault(group, []).append(score)
    value = fmean(map(fmean, parts.values()))
    if any(len(part) < 2 for part in parts.values()):
        return Estimate(value, None)
    return Estimate(value, math.sqrt(sum(variance(part) / len(part) for part in parts.values())) / len(parts))


def majority(verdicts: Sequence[Verdict], same: Callable[[Any, Any], bool]) -> Verdict:
    """Return the verdict of the most frequent vote, the earliest among ties. Votes that are the `same` are counted
    together.

    The most frequent votes are compared first, until the rest cannot overtake: `same` may be slow.
    """
    votes = Counter(verdict.vote for verdict in verdicts if verdict.vote is not None)  # equal votes are compared once
    if not votes:
        return verdicts[0]
    together: Counter[Any] = Counter()
    group_of: dict[Any, Any] = {}
    left = votes.total()
    for vote, count in votes.most_common():
        best, second = [*sorted(together.values(), reverse=True), 0, 0][:2]
        if best > second + left:
            break
        group_of[vote] = next((first for first in together if same(first, vote)), vote)
        together[group_of[vote]] += count
        left -= count
    leaders = [group for group, count in together.items() if count == max(together.values())]
    vote = next(vote for vote in votes if (group_of[vote] in leaders if vote in group_of else same(leaders[0], vote)))
    return next(verdict for verdict in verdicts if verdict.vote == vote)


def summarize(task: Task, asked: Sequence[Asked], records: Sequence[Mapping[str, Any]], samples: int,
              context_tokens: int) -> Result:
    """Score the records of all questions and return the task's result."""
    verdicts = [[task.answer(text, one.item) for text in record["responses"]]
                for one, record in zip(asked, records, strict=True)]
    groups = [one.item.group for one in asked]
    decided = [majority(each, task.same) for each in verdicts]
    metrics = {name: estimate([verdict.scores[i] for verdict in decided], groups)
               for i, name in enumerate(task.metrics)}
    if samples > 1:
        for i, name in enumerate(task.metrics):
            means = [fmean(verdict.scores[i] for verdict in each) for each in verdicts]
            metrics[f"{name}_mean"] = estimate(means, groups)
    by_group = {group: estimate([verdict.scores[0] for verdict, own in zip(decided, groups, strict=True)
                                 if own == group], [group] * groups.count(group)) for group in dict.fromkeys(groups)}
    finishes = Counter(finish for record in records for finish in record["finish"])
    return Result(task, metrics, by_group if list(by_group) != [""] else {}, len(asked), samples,
                  sum(verdict.invalid for verdict in decided), finishes[TOO_LONG] // samples,
                  sum(one.shots < task.special_shots.get(one.item.group, task.shots) for one in asked),
                  finishes["length"] if task.new_tokens is None else 0, context_tokens)
