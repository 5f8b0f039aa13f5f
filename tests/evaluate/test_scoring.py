"""What a text answers and whether that is right, on answers that are meant to mislead."""
import pytest

from hrm_megatron.evaluate.drop import best_scores, gold_answers, normalized
from hrm_megatron.evaluate.prompts import Item
from hrm_megatron.evaluate.scoring import (
    choice_answer,
    last_boxed,
    letter_answer,
    math_answer,
    number_answer,
    same_math,
)


@pytest.mark.parametrize(("text", "boxed"), [
    (r"so \boxed{3}", "3"),
    (r"\boxed{1} or rather \boxed{2}.", "2"),
    (r"\boxed{\frac{1}{2}} and then {more}", r"\frac{1}{2}"),
    (r"\boxed { 7 }", "7"),
    (r"\fbox{4}", "4"),
    (r"\boxed{5} \fbox{6}", "5"),
    (r"\boxed{1} \boxed{2", None),
    (r"\boxed 5", None),
    (r"\boxed{}", ""),
    ("5", None),
])
def test_the_last_box_counts(text, boxed):
    assert last_boxed(text) == boxed


@pytest.mark.parametrize(("text", "vote"), [
    (r"Thus \boxed{1,200}", 1200), (r"\boxed{\$18}", None), (r"\boxed{$18}", 18), ("1,200", 1200), (" 72\n", 72),
    (r"\boxed{18.0}", 18), (r"\boxed{18.9}", 18), (r"\boxed{18 apples}", None), (r"\boxed{3} not \boxed{4}", 4),
    (r"\boxed{1e400}", None), (r"\boxed{nan}", None), ("It is 18.", None), ("", None), (r"\boxed{}", None),
    (r"\boxed{-5}", -5),
])
def test_numbers(text, vote):
    verdict = number_answer(text, Item("", 1200))
    assert (verdict.vote, verdict.invalid) == (vote, vote is None)
    assert verdict.scores == (float(vote == 1200),)


TEN = tuple("ABCDEFGHIJ")


@pytest.mark.parametrize(("text", "vote"), [
    ("The answer is (C).", "C"), ("(A) is wrong, so (B)", "B"), ("(A) or maybe B", "A"), ("J", "J"), ("K", None),
    ("A cat", "A"), ("so I think B", "B"), (r"(A) hence \boxed{D}", "D"), (r"\boxed{(E)}", "E"), ("c", None),
    ("", None),
])
def test_letters_of_free_answers(text, vote):
    verdict = letter_answer(text, Item("", "B", TEN))
    assert (verdict.vote, verdict.invalid) == (vote, vote is None)
    assert verdict.scores == ((0.1,) if vote is None else (float(vote == "B"),))


@pytest.mark.parametrize(("text", "score"), [("B", 1.0), (" b\n", 1.0), ("A", 0.0), ("D", 1 / 3), ("", 1 / 3),
                                             ("(B)", 1 / 3), ("B.", 1 / 3)])
def test_one_letter_or_the_worth_of_a_guess(text, score):
    assert choice_answer(text, Item("", "B", ("A", "B", "C"))).scores == (score,)


DROP_CASES = [  # answer, gold answers, exact match and F1 by the rules of DROP's official script
    ("The Bills", [("bills",)], (1.0, 1.0)),  # article and case
    ("3.0", [("3",)], (1.0, 1.0)),
    ("3 touchdowns", [("3",)], (0.0, 0.67)),
    ("4 yards", [("3 yards",)], (0.0, 0.0)),  # another number: nothing counts
    ("yards", [("3 yards",)], (0.0, 0.0)),
    ("23-yard", [("23 yard",)], (1.0, 1.0)),
    ("1,200", [("1200",)], (1.0, 1.0)),
    ("Tom Brady", [("Tom Brady", "Randy Moss")], (0.0, 0.5)),  # one of two spans
    ("Brady", [("Tom Brady", "Randy Moss")], (0.0, 0.34)),  # 0.67 rounded after halving: 1/3
    ("Moss", [("Tom Brady",), ("Randy Moss",)], (0.0, 0.67)),  # the better of two gold answers
    ("", [("Tom Brady",)], (0.0, 0.0)),
    ("the", [("a",)], (1.0, 1.0)),  # both are empty once normalized
    ("anything", [("",)], (0.0, 0.0)),  # an empty gold answer counts nothing
    ("U.S.", [("US",)], (1.0, 1.0)),
    ("10.5%", [("10.5",)], (0.0, 0.0)),  # punctuation goes first, and 105 is left
    ("2 3", [("2 4",)], (0.0, 0.5)),
]


@pytest.mark.parametrize(("answer", "golds", "want"), DROP_CASES)
def test_drop(answer, golds, want):
    em, f1 = best_scores(answer, golds)
    assert em == want[0] and abs(f1 - want[1]) <= 0.011  # rounding to two digits, before and after halving


def test_drop_equals_the_harness():
    """An implementation by other hands, on every answer against every gold answer above."""
    theirs = pytest.importorskip("lm_eval.tasks.drop.utils", reason="needs lm_eval, extra lm-eval")
    golds = [gold for _, each, _ in DROP_CASES for gold in each]
    answers = {answer for answer, _, _ in DROP_CASES} | {span for gold in golds for span in gold} | {
        "nan", "inf", "1_000", "-5", "a-b c", "é à", "the  a\nan", "$3", "3rd", "12:30"}
    for answer in sorted(answers):
        want = theirs.process_results(dict(answers=golds), [answer])
        assert best_scores(answer, golds) == (want["em"], want["f1"]), answer
        for gold in golds:
            want = theirs.process_results(dict(answers=[gold]), [answer])
            assert best_scores(answer, [gold]) == (want["em"], want["f1"]), (answer, gold)
        assert normalized(answer) == theirs._normalize(answer)


def test_drops_gold_answers_come_once_each():
    def answer(number="", spans=(), day="", month="", year=""):
        return dict(number=number, spans=list(spans), date=dict(day=day, month=month, year=year))
    others = [answer("3"), answer(spans=["x", "y"]), answer(month="May", year="1364"), answer()]
    row = dict(answer=answer("3"), validated_answers={
        name: [each[name] for each in others] for name in ("number", "spans", "date")})
    assert gold_answers(row) == (("3",), ("x", "y"), ("May 1364",), ("",))


@pytest.mark.parametrize(("gold", "text", "acc", "latex"), [
    ("1200", r"\boxed{1,200}", 1, 1),
    (r"\frac{1}{2}", r"\boxed{\frac{1}{2}}", 1, 1),
    (r"\frac{1}{2}", r"\boxed{0.5}", 1, 1),
    (r"\frac{1}{2}", r"\boxed{2}", 0, 0),
    ("12", r"\boxed{12\text{ cm}}", 1, 1),
    ("5", r"\boxed{4}, no, \boxed{x=5}", 1, 1),
    (r"3\sqrt{2}", r"\boxed{\sqrt{18}}", 0, 1),  # bare, the root is not read
    ("x^2+1", r"\boxed{1+x^2}", 0, 1),
    ("x^2+1", r"\boxed{x^2+1}", 0, 1),  # wrong against itself, as the reference scores it
    ("(1,2)", r"\boxed{(1, 2)}", 0, 1),
    (r"\text{(C)}", r"\boxed{C}", 0, 1),
    ("[0,1)", r"\boxed{[0,1]}", 0, 0),
    ("7", "The answer is 7", 1, 1),
])
def test_math(gold, text, acc, latex):
    pytest.importorskip("math_verify", reason="needs math-verify, extra evaluate")
    verdict = math_answer(text, Item("", gold))
    assert verdict.scores == (acc, latex) and verdict.invalid == ("boxed" not in text)


@pytest.mark.parametrize(("gold", "stated", "latex"), [
    ("5", "9^{9^{9^{9}}}", 0), ("5", r"\binom{10^9}{10^8}", 0), ("5", "(1+x)^{1000000}", 0), ("5", "1000000000!", 0),
    ("5", "e^{e^{e^{e^{e}}}}", 0), (r"\{1,2\}", "\\{1,10^{10^{10}}\\}", 0),
    ("10^{10^{10}}", "10^{10^{10}}", 1), ("-1", "(-1)^{1000001}", 1), ("4999950000", r"\binom{100000}{2}", 1),
    ("1" + 100 * "0", "10^{10^2}", 1), ("5", r"((10^{9999})^{9999})^{9999}", 0),
])
def test_numbers_without_end_are_compared_as_they_are_written(gold, stated, latex, monkeypatch):
    """math-verify would work on these until its time is out."""
    math_verify = pytest.importorskip("math_verify", reason="needs math-verify, extra evaluate")
    compared, stock = [], math_verify.verify
    monkeypatch.setattr(math_verify, "verify", lambda *args, **how: compared.append(args) or stock(*args, **how))
    assert math_answer(rf"\boxed{{{stated}}}", Item("", gold)).scores[1] == latex
    assert same_math(stated, stated) and len(compared) == 1 + 2 * (latex and gold != stated)  # one is bare


@pytest.mark.parametrize(("gold", "stated", "same"), [
    ("(x+1)^{200}", "(1+x)^{200}", True), ("2\\cdot 3^{20000}", "3^{20000}\\cdot 2", True),
    ("x^{20000}+1", "1+x^{20001}", False), ("2^{20000}", "20000^2", False)])
def test_what_is_compared_as_it_is_written_may_stand_in_another_order(gold, stated, same):
    pytest.importorskip("math_verify", reason="needs math-verify, extra evaluate")
    assert same_math(gold, stated) == same


@pytest.mark.parametrize("stated", [r"2^{\frac{0}{0}}", r"(\frac{0}{0})!", r"2^{\sum_{k=1}^{\infty}\frac{1}{k}}"])
def test_an_exponent_that_is_none_is_a_wrong_answer(stated):
    pytest.importorskip("math_verify", reason="needs math-verify, extra evaluate")
    assert not math_answer(rf"\boxed{{{stated}}}", Item("", "5")).scores[1]
