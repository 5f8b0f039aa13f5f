"""Rows as prompts, to the letter, and what their answers add up to."""
import math
from dataclasses import replace

import pytest

from hrm_megatron.evaluate.prompts import DROP_SHOTS, BadItem, Item, arc, drop, gsm8k, hellaswag, mmlu_pro, winogrande
from hrm_megatron.evaluate.prompts import boolq as boolq_item
from hrm_megatron.evaluate.prompts import mmlu as mmlu_item
from hrm_megatron.evaluate.summary import Estimate, estimate, majority
from hrm_megatron.evaluate.tasks import TASKS, spelled, with_shots
from hrm_megatron.evaluate.verdict import Verdict


def test_shots_are_answered_blocks_before_the_question():
    shot = mmlu_item(dict(question=" What is 1+1? ", choices=["1", " 2 "], answer=1, subject="sums"))
    asked = mmlu_item(dict(question="What is 2+2?", choices=["4", "5"], answer=0, subject="sums"))
    assert spelled(TASKS["mmlu"], asked, [shot]) == \
        "What is 1+1?\nA. 1\nB. 2\nAnswer: B\n\nWhat is 2+2?\nA. 4\nB. 5\nAnswer:"
    assert (asked.gold, asked.letters, asked.group) == ("A", ("A", "B"), "sums")


@pytest.mark.parametrize(("make", "row", "text", "gold"), [
    (boolq_item, dict(question="is it blue", passage="The sky.", answer=False),
     "The sky.\nQuestion: Is it blue?\nA. Yes\nB. No\nAnswer:", "B"),
    (hellaswag, dict(ctx_a="A man sits.", ctx_b="he THEN", endings=["eats.", "flies."], label="1"),
     "A man sits. He then\nQuestion: Which is the most logical continuation?\nA. eats.\nB. flies.\nAnswer:", "B"),
    (winogrande, dict(sentence="The cup fits _.", option1="it", option2="the box", answer="2"),
     "The cup fits _.\nA. it\nB. the box\nAnswer:", "B"),
    (arc, dict(question="Why?", choices=dict(text=["so", "no"], label=["A", "B"]), answerKey="A"),
     "Why?\nA. so\nB. no\nAnswer:", "A"),
    (arc, dict(question="Why?", choices=dict(text=["so", "no"], label=["1", "2"]), answerKey="2"),
     "Why?\nA. so\nB. no\nAnswer:", "B"),
])
def test_choices(make, row, text, gold):
    item = make(row)
    assert (spelled(TASKS["mmlu"], item, []), item.gold) == (text, gold)


def test_free_questions():
    assert gsm8k(dict(question="How many?", answer="3 * 400 = 1200\n#### 1,200")) == Item("How many?", 1200)
    item = mmlu_pro(dict(question="Which?", options=["x", "y"], answer="B", category="law"))
    assert (item.question, item.gold, item.group) == ("Which?\nOptions:\n(A) x\n(B) y", "B", "law")
    answer = dict(number="7", spans=[], date=dict(day="", month="", year=""))
    item = drop(dict(passage="P.", question="Q?", answer=answer, validated_answers=dict(number=[], date=[], spans=[])))
    text = spelled(TASKS["drop"], item, [])
    assert text == "\n\n".join([*DROP_SHOTS, "P.\nQ: Q?\nA:"]) and text.count("\nA:") == 4
    assert spelled(with_shots(TASKS["drop"], 0), item, []) == "P.\nQ: Q?\nA:"


@pytest.mark.parametrize(("make", "row", "message"), [
    (gsm8k, dict(question="", answer="#### many"), "no whole number"),
    (mmlu_item, dict(question="", choices=["a"], answer=1, subject=""), "the right choice is number 1 of 1"),
    (mmlu_pro, dict(question="", options=["a"], answer="B", category=""), "answer='B' is none of A"),
    (winogrande, dict(sentence="", option1="", option2="", answer=""), "neither '1' nor '2'"),
    (hellaswag, dict(ctx_a="", ctx_b="", endings=[], label=""), "label='' is no number"),
    (arc, dict(question="", choices=dict(text=["a", "b"], label=["A", "B"]), answerKey="E"), "number 4 of 2"),
])
def test_a_row_that_makes_no_question_says_why(make, row, message):
    with pytest.raises(BadItem, match=message):
        make(row)


def test_the_majority_decides_and_the_first_of_equals():
    right, wrong, none = Verdict(4, (1.0,)), Verdict(5, (0.0,)), Verdict(None, (0.25,), True)
    assert majority([none, wrong, right, right]) is right
    assert majority([none, none, wrong]) is wrong
    assert majority([wrong, right]) is wrong
    assert majority([none, none]) is none


def test_groups_count_alike_and_so_do_their_errors():
    assert estimate([1.0, 0.0, 1.0, 1.0], [""] * 4) == Estimate(0.75, math.sqrt(0.25 / 4))  # variance (3/16) 4/3
    found = estimate([1.0, 0.0, 1.0, 1.0, 1.0, 1.0], ["a", "a", "b", "b", "b", "b"])
    assert found == Estimate(0.75, math.sqrt(0.5 / 2) / 2)
    assert estimate([1.0], [""]).stderr is None


def test_the_published_row_is_that_of_the_paper():
    assert {name: task.published for name, task in TASKS.items()} == dict(
        gsm8k=84.5, math=56.2, drop=82.2, mmlu=60.7, mmlu_pro=None, arc_challenge=81.9, hellaswag=63.4,
        winogrande=72.4, boolq=86.2)
    assert replace(TASKS["mmlu"]).special_shots == {"high_school_european_history": 3}
