"""DROP's exact match and F1 for an answer of one span, as in its official script (Dua et al., 2019).

Texts become bags of words: lower case, split at spaces and hyphens, without articles and punctuation, numbers as
floats.
"""
from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from typing import Any

Gold = tuple[str, ...]  # the spans of one gold answer
ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def gold_answers(row: Mapping[str, Any]) -> tuple[Gold, ...]:
    """Return the distinct gold answers of a row: its own, then those of other annotators."""
    others = row["validated_answers"]
    candidates = [row["answer"], *({name: others[name][i] for name in ("number", "date", "spans")}
                                   for i in range(len(others["number"])))]
    return tuple(dict.fromkeys(map(_spans, candidates)))


def _spans(answer: Mapping[str, Any]) -> Gold:
    if answer["number"] != "":
        return (str(answer["number"]),)
    if answer["spans"]:
        return tuple(answer["spans"])
    return (" ".join(answer["date"][part] for part in ("day", "month", "year")).strip(),)


def best_scores(answer: str, golds: Sequence[Gold]) -> tuple[float, float]:
    """Return (exact match, F1) of `answer`, each the best over the gold answers; empty gold answers are ignored."""
    scores = [_scores(answer, gold) for gold in golds if gold[0].strip()]
    return max((em for em, _ in scores), default=0.0), max((f1 for _, f1 in scores), default=0.0)


def _scores(answer: str, gold: Gold) -> tuple[float, float]:
    stated, spans = normalized(answer), [normalized(span) for span in gold]
    # The answer is one span, so the best assignment is one pair; all other gold spans get 0.
    best = max(_f1(set(stated.split()), set(span.split())) for span in spans)
    return float(spans == [stated]), round(best / len(spans), 2)


def _f1(stated: set[str], gold: set[str]) -> float:
    numbers = {word for word in gold if is_number(word)}
    if numbers and not numbers & stated:
        return 0.0
    common = len(stated & gold)
    precision = common / len(stated) if stated else 1.0
    recall = common / len(gold) if gold else 1.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def normalized(text: str) -> str:
    words = (_word(word.lower()) for word in re.split("[ -]", text))
    return " ".join(word for word in words if word)


def _word(word: str) -> str:
    if not is_number(word):
        word = word.translate(PUNCTUATION)
    if is_number(word):
        word = str(float(word))
    return " ".join(ARTICLES.sub(" ", word).split())


def is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
