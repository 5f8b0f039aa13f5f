"""The table of the reference's tasks: source of the rows, prompt format, scoring, and published results.

Prompts, shots, conditions and scoring are those of HRM-Text's `evaluation/` (benchmarks.py, hrm_benchmarking.yaml).
"""
from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from hrm_megatron.config import ConfigError
from hrm_megatron.evaluate import prompts
from hrm_megatron.evaluate.prompts import Choice, Item
from hrm_megatron.evaluate.scoring import (
    choice_answer,
    drop_answer,
    letter_answer,
    math_answer,
    number_answer,
    same_math,
)
from hrm_megatron.evaluate.verdict import Verdict

Row = Mapping[str, Any]
REASONING, DIRECT = "synth,cot", "direct"
ONE_TOKEN = 1
TOO_LONG = "too long"  # "finish" of a question that does not fit the context


@dataclass(frozen=True)
class Source:
    """A dataset on the hub; `name` is its configuration, `names` are several that are read in order."""

    path: str
    split: str
    name: str | None = None
    names: tuple[str, ...] = ()
    shots_split: str | None = None


@dataclass(frozen=True)
class Task:
    """`item` converts a row to a question; `answer` extracts and scores the answer of a text; `same` decides whether
    two differently written votes are equal.

    `shots` examples precede a question, `special_shots` of them for a group named there, and `fewer_shots` if the
    prompt would exceed the context otherwise. `new_tokens` None: as many as fit the context. `metrics` names the scores
    of a verdict; `published` (percent) is of the first.
    """

    name: str
    title: str
    source: Source
    fields: Mapping[str, type | tuple[type, ...]]
    item: Callable[[Row], Item]
    answer: Callable[[str, Item], Verdict]
    condition: str = DIRECT
    context_tokens: int = 4096
    new_tokens: int | None = ONE_TOKEN
    shots: int = 0
    special_shots: Mapping[str, int] = field(default_factory=dict)
    fewer_shots: int | None = None
    grouped_shots: bool = False  # shots come from rows of the question's own group
    fixed_shots: Sequence[str] = ()
    metrics: tuple[str, ...] = ("acc",)
    same: Callable[[Any, Any], bool] = operator.eq
    published: float | None = None


MATH_SUBSETS = ("algebra", "counting_and_probability", "geometry", "intermediate_algebra", "number_theory",
                "prealgebra", "precalculus")
TEXTS = (list, tuple)

TASKS: Mapping[str, Task] = {task.name: task for task in (
    Task("gsm8k", "GSM8K", Source("openai/gsm8k", "test", "main"), dict(question=str, answer=str), prompts.gsm8k,
         number_answer, REASONING, 3072, None, published=84.5),
    Task("math", "MATH", Source("EleutherAI/hendrycks_math", "test", names=MATH_SUBSETS),
         dict(problem=str, solution=str), prompts.math, math_answer, REASONING, 3072, None,
         metrics=("acc", "acc_latex"), same=same_math, published=56.2),
    Task("drop", "DROP", Source("EleutherAI/drop", "validation"),
         dict(passage=str, question=str, answer=dict, validated_answers=dict), prompts.drop, drop_answer,
         context_tokens=3072, new_tokens=None, fixed_shots=prompts.DROP_SHOTS, metrics=("f1", "em"), published=82.2),
    Task("mmlu", "MMLU", Source("cais/mmlu", "test", "all", shots_split="dev"),
         dict(question=str, choices=TEXTS, answer=int, subject=str), prompts.mmlu, choice_answer, shots=5,
         special_shots={"high_school_european_history": 3}, fewer_shots=3, grouped_shots=True, published=60.7),
    Task("mmlu_pro", "MMLU-Pro", Source("TIGER-Lab/MMLU-Pro", "test", "default"),
         dict(question=str, options=TEXTS, answer=str, category=str), prompts.mmlu_pro, letter_answer,
         context_tokens=3072, new_tokens=None),
    Task("arc_challenge", "ARC-C", Source("allenai/ai2_arc", "test", "ARC-Challenge", shots_split="validation"),
         dict(question=str, choices=dict, answerKey=str), prompts.arc, choice_answer, shots=25, published=81.9),
    Task("hellaswag", "HellaSwag", Source("Rowan/hellaswag", "validation", shots_split="train"),
         dict(ctx_a=str, ctx_b=str, endings=TEXTS, label=(str, int)), prompts.hellaswag, choice_answer, shots=10,
         published=63.4),
    Task("winogrande", "Winogrande", Source("allenai/winogrande", "validation", "winogrande_debiased",
                                            shots_split="train"),
         dict(sentence=str, option1=str, option2=str, answer=(str, int)), prompts.winogrande, choice_answer, shots=5,
         published=72.4),
    Task("boolq", "BoolQ", Source("google/boolq", "validation", shots_split="train"),
         dict(question=str, passage=str, answer=(bool, int)), prompts.boolq, choice_answer, shots=5, published=86.2),
)}


@dataclass(frozen=True)
class Asked:
    """A question as a prompt with this number of `shots`; `prompt` is None if it does not fit the context."""

    place: str
    item: Item
    shots: int
    prompt: Sequence[int] | None


def chosen(names: Sequence[str], conditions: Mapping[str, str]) -> list[Task]:
    """Return the tasks with these names in the table's order, with the given conditions instead of theirs."""
    for name in (*names, *conditions):
        if name not in TASKS:
            raise ConfigError(f"task {name!r}: unknown; choose from {', '.join(TASKS)}")
    if twice := [name for name in TASKS if names.count(name) > 1]:
        raise ConfigError(f"task {twice[0]!r}: is named twice; name it once")
    if idle := [name for name in conditions if name not in names]:
        raise ConfigError(f"--condition {idle[0]}=...: that task is not among --tasks; leave one of them out")
    return [replace(task, condition=conditions.get(name, task.condition)) for name, task in TASKS.items()
            if name in names]


def with_shots(task: Task, number: int) -> Task:
    """Return the task with another number of shots for all its questions."""
    most = None if task.source.shots_split else len(task.fixed_shots)
    if most is not None and number > most:
        raise ConfigError(f"--shots {task.name}={number}: {task.title} has {most}; give at most that")
    fewer = None if task.fewer_shots is None else min(number, task.fewer_shots)
    return replace(task, shots=number if most is None else 0, special_shots={}, fewer_shots=fewer,
                   fixed_shots=task.fixed_shots[:number])


def spelled(task: Task, item: Item, shots: Sequence[Item]) -> str:
    """Return an item with its shots as one instruction."""
    if isinstance(item.question, Choice):
        return prompts.with_shots(item, shots)
    return "".join(f"{shot}\n\n" for shot in task.fixed_shots) + item.question
