"""Rows as prompts, to the letter, and what their answers add up to."""
import math
import operator
from dataclasses import replace

import numpy as np
import pytest

from hrm_megatron.config import ConfigError
from hrm_megatron.evaluate.prompts import DROP_SHOTS, BadItem, Item, arc, drop, gsm8k, hellaswag, mmlu_pro, winogrande
from hrm_megatron.evaluate.prompts import boolq as boolq_item
from hrm_megatron.evaluate.prompts import mmlu as mmlu_item
from hrm_megatron.evaluate.rows import read_items, split_files
from hrm_megatron.evaluate.scoring import _parsed, math_answer
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
    assert majority([none, wrong, right, right], operator.eq) is right
    assert majority([none, none, wrong], operator.eq) is wrong
    assert majority([wrong, right], operator.eq) is wrong
    assert majority([none, none], operator.eq) is none


def test_a_majority_is_found_in_few_comparisons_and_is_that_of_all():
    """Of 64 answers, 40 of them one number in several spellings; then random ones, against all comparisons."""
    compared = []

    def same(one, other):
        compared.append((one, other))
        return int(float(one)) == int(float(other))
    spellings = ["7.5", *(f"7.{digit}" for digit in (1, 1, 1, 2)), *["7.3"] * 35]
    verdicts = [Verdict(text, ()) for text in [*map(str, range(100, 124)), *spellings]]
    assert majority(verdicts, same).vote == "7.5" and len(compared) < 70  # 24 others come before the first of them
    random = np.random.default_rng(0)
    for _ in range(200):
        votes = [f"{number}.{spelling}" for number, spelling in zip(random.integers(0, 4, 12), random.integers(
            0, 3, 12), strict=True)]
        numbers = [int(float(vote)) for vote in votes]
        first = max(range(12), key=lambda i: (numbers.count(numbers[i]), -i))
        assert majority([Verdict(vote, ()) for vote in votes], lambda a, b: int(float(a)) == int(float(b))).vote == (
            votes[first])


def test_each_answer_of_math_is_parsed_once(monkeypatch):
    math_verify = pytest.importorskip("math_verify", reason="needs math-verify, extra evaluate")
    parsed, parse = [], math_verify.parse
    monkeypatch.setattr(math_verify, "parse", lambda text, **options: parsed.append(text) or parse(text, **options))
    _parsed.cache_clear()
    votes = [math_answer(rf"\boxed{{{n}}}", Item("", "9")) for n in (11, 12, 13, 14)]
    majority(votes, TASKS["math"].same)
    assert len(parsed) == len({*parsed})


def test_equivalent_spellings_of_an_answer_vote_together():
    pytest.importorskip("math_verify", reason="needs math-verify, extra evaluate")
    texts = ("3", "3", "", "", "", r"\frac{1}{2}", r"\frac12", "0.5")
    votes = [math_answer(rf"\boxed{{{text}}}", Item("", r"\frac{1}{2}")) for text in texts]
    assert majority(votes, TASKS["math"].same) is votes[5]
    assert votes[2].invalid and majority(votes[:3], TASKS["math"].same) is votes[0]


@pytest.mark.parametrize(("make", "row", "message"), [
    (mmlu_item, dict(question="Q", choices=["a", 3], answer=0, subject="s"), "choice 2 is 3, not text"),
    (arc, dict(question="Q", choices=dict(text=[None, "a"], label=["A", "B"]), answerKey="A"), "choice 1 is None,"),
    (hellaswag, dict(ctx_a="A", ctx_b="b", endings=["a", None], label="0"), "choice 2 is None, not text"),
    (mmlu_pro, dict(question="Q", options=["a", None], answer="A", category="c"), "choice 2 is None, not text"),
    (drop, dict(passage="P", question="Q", answer=dict(number="", spans=["a", 7]),
                validated_answers=dict(number=[])), "span 2 is 7, not text"),
])
def test_what_is_no_text_is_refused_by_its_row(make, row, message):
    with pytest.raises(BadItem, match=message):
        make(row)


@pytest.mark.parametrize(("names", "message"), [
    (["test.jsonl", "test-00000-of-00001.parquet"], "as test.jsonl and test-00000-of-00001.parquet; keep one"),
    (["test.jsonl", "test/a.jsonl"], "as test.jsonl and test/a.jsonl; keep one of them"),
    (["test.jsonl", "test.jsonl.gz"], "as test.jsonl and test.jsonl.gz; keep one of them"),
    (["test-00000-of-00001.jsonl", "test-00000-of-00002.jsonl", "test-00001-of-00002.jsonl"], "more than once"),
    (["test-00000-of-00003.jsonl", "test-00002-of-00003.jsonl"], "test-00001-of-00003 is missing beside it; put it"),
    (["test/a/x-00000-of-00001.jsonl", "test/b/x-00000-of-00001.jsonl"], None),
    (["test.jsonl", "dev.jsonl"], None),
])
def test_a_split_is_read_whole_and_once(tmp_path, names, message):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    if message is None:
        assert split_files(tmp_path, "test") == [tmp_path / name for name in names if name.startswith("test")]
    else:
        with pytest.raises(ConfigError, match=message):
            split_files(tmp_path, "test")


def test_rows_for_shots_are_read_only_where_shots_are_wanted(tmp_path):
    (tmp_path / "boolq").mkdir()
    (tmp_path / "boolq" / "validation.jsonl").write_text('{"question": "q", "passage": "p", "answer": true}\n')
    [question], shots = read_items(with_shots(TASKS["boolq"], 0), tmp_path)
    assert question.item.gold == "A" and shots == []
    with pytest.raises(ConfigError, match="no split 'train'"):
        read_items(TASKS["boolq"], tmp_path)


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
