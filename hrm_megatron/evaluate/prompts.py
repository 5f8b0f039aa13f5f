"""Convert rows to questions, formatted as in the reference."""
from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hrm_megatron.data.text_files import shown
from hrm_megatron.evaluate.drop import gold_answers
from hrm_megatron.evaluate.scoring import last_boxed

Row = Mapping[str, Any]
# From DROP's training set (Dua et al., NAACL 2019, CC BY-SA 4.0): passage, question and answer of each.
DROP_SHOTS: tuple[str, ...] = tuple(json.loads(Path(__file__).with_name("drop_shots.json").read_text("utf-8")))


class BadItem(ValueError):
    """A row with the right fields that cannot be made a question; the message says why."""


@dataclass(frozen=True)
class Choice:
    """A question with lettered choices."""

    text: str
    choices: tuple[str, ...]
    right: int


@dataclass(frozen=True)
class Item:
    """A question, its right answer, the letters allowed as answers, and the group in whose mean it counts."""

    question: str | Choice
    gold: Any
    letters: tuple[str, ...] = ()
    group: str = ""


def letter(index: int) -> str:
    return chr(ord("A") + index)


def _texts(what: str, values: Sequence[Any]) -> tuple[str, ...]:
    """Return `values` if all are text, else raise BadItem: the task's fields only declare a list."""
    for number, value in enumerate(values, 1):
        if not isinstance(value, str):
            raise BadItem(f"{what} {number} is {shown(value)}, not text")
    return tuple(values)


def _choice(text: str, choices: Sequence[Any], right: int, group: str = "") -> Item:
    texts = _texts("choice", choices)
    if not 0 <= right < len(choices):
        raise BadItem(f"the right choice is number {right} of {len(choices)}")
    return Item(Choice(text, texts, right), letter(right), tuple(map(letter, range(len(choices)))), group)


def _block(choice: Choice, answered: bool) -> str:
    lines = [choice.text.strip(), *(f"{letter(i)}. {text.strip()}" for i, text in enumerate(choice.choices))]
    return "\n".join([*lines, "Answer:" + f" {letter(choice.right)}" * answered])


def with_shots(item: Item, shots: Sequence[Item]) -> str:
    """Return the blocks of answered shots and then the question's, separated by blank lines."""
    blocks = [_block(shot.question, True) for shot in shots if isinstance(shot.question, Choice)]
    assert isinstance(item.question, Choice) and len(blocks) == len(shots)
    return "\n\n".join([*blocks, _block(item.question, False)])


def gsm8k(row: Row) -> Item:
    number = row["answer"].split("####")[-1].strip().replace(",", "")
    try:
        return Item(row["question"], int(number))
    except ValueError as error:
        raise BadItem(f"answer ends with {number[:20]!r}, no whole number after '####'") from error


def math(row: Row) -> Item:
    gold = last_boxed(row["solution"])
    if gold is None:
        raise BadItem("solution has no \\boxed{...}")
    return Item(row["problem"], gold)


def drop(row: Row) -> Item:
    try:
        gold = gold_answers(row)
    except (KeyError, IndexError, TypeError) as error:
        raise BadItem(f"answer or validated_answers lack number, date or spans ({error!r})") from error
    for spans in gold:
        _texts("span", spans)
    return Item(f"{row['passage']}\nQ: {row['question']}\nA:", gold)


def mmlu(row: Row) -> Item:
    return _choice(row["question"], row["choices"], row["answer"], row["subject"])


def mmlu_pro(row: Row) -> Item:
    letters = tuple(map(letter, range(len(row["options"]))))
    if row["answer"] not in letters:
        raise BadItem(f"answer={row['answer']!r} is none of {', '.join(letters)}")
    choices = zip(letters, _texts("choice", row["options"]), strict=True)
    lines = [row["question"], "Options:", *(f"({name}) {text}" for name, text in choices)]
    return Item("\n".join(lines), row["answer"], letters, row["category"])


def arc(row: Row) -> Item:
    texts = row["choices"].get("text")
    if not isinstance(texts, list):
        raise BadItem("choices has no list 'text'")
    key = row["answerKey"]
    labels = row["choices"].get("label")
    # Some rows number their choices, where the reference's letter arithmetic would fail.
    right = labels.index(key) if isinstance(labels, list) and key in labels else ord(key[:1] or "\0") - ord("A")
    return _choice(row["question"], texts, right)


def hellaswag(row: Row) -> Item:
    if not str(row["label"]).isdigit():
        raise BadItem(f"label={row['label']!r} is no number")
    text = f"{row['ctx_a']} {row['ctx_b'].capitalize()}\nQuestion: Which is the most logical continuation?"
    return _choice(text, row["endings"], int(row["label"]))


def winogrande(row: Row) -> Item:
    if str(row["answer"]) not in ("1", "2"):
        raise BadItem(f"answer={row['answer']!r} is neither '1' nor '2'")
    return _choice(row["sentence"], [row["option1"], row["option2"]], int(row["answer"]) - 1)


def boolq(row: Row) -> Item:
    return _choice(f"{row['passage']}\nQuestion: {row['question'].capitalize()}?", ["Yes", "No"],
                   1 - bool(row["answer"]))
