"""Extract the answer from a text and score it."""
from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from hrm_megatron.config import ConfigError
from hrm_megatron.evaluate.drop import best_scores, normalized
from hrm_megatron.evaluate.verdict import Verdict

if TYPE_CHECKING:
    from hrm_megatron.evaluate.prompts import Item

# The library's default of 5 seconds is too short on a busy machine, and scores must not depend on load.
MATH_TIMEOUT_SECONDS = 60
# Larger exponents and arguments of factorials are not evaluated: a short answer could otherwise take hours.
LARGEST_EXPONENT = 10_000
LARGEST_DEGREE = 100  # the same for powers of sums with variables


def last_boxed(text: str) -> str | None:
    r"""Return the contents of the last \boxed{...} (else \fbox) with balanced braces; None if there is none."""
    start = text.rfind("\\boxed")
    start = text.rfind("\\fbox") if start < 0 else start
    depth, opened = 0, None
    for place in range(start, len(text)) if start >= 0 else ():
        if text[place] == "{":
            depth, opened = depth + 1, place if opened is None else opened
        elif text[place] == "}":
            depth -= 1
            if depth == 0 and opened is not None:
                return text[opened + 1:place].strip()
    return None


def number_answer(text: str, item: Item) -> Verdict:
    """GSM8K: the boxed number, else the whole text if it is a number; decimals are truncated."""
    stated = (last_boxed(text) or text).replace(",", "").replace("$", "").strip()
    try:
        number = int(float(stated))
    except (ValueError, OverflowError):
        return Verdict(None, (0.0,), invalid=True)
    return Verdict(number, (float(number == item.gold),))


def math_answer(text: str, item: Item) -> Verdict:
    r"""MATH: `acc` compares the bare contents of \boxed, as the reference does; `acc_latex` compares them as LaTeX.

    Without LaTeX delimiters math-verify parses only plain numbers and a leading LaTeX fraction: it reads 3 from
    `3\sqrt{2}`, and nothing from `x^2+1` or `(1, 2)`, which are then wrong even against themselves.
    """
    boxed = last_boxed(text)
    answer = text if boxed is None else boxed
    bare = equal_math(item.gold, answer)
    latex = equal_math(f"\\boxed{{{item.gold}}}", answer if boxed is None else f"\\boxed{{{answer}}}")
    return Verdict(boxed or None, (float(bare), float(latex)), invalid=not boxed)


def same_math(one: str, other: str) -> bool:
    """Whether the contents of two boxes are equal as LaTeX."""
    return equal_math(f"\\boxed{{{one}}}", f"\\boxed{{{other}}}")


def equal_math(gold: str, answer: str) -> bool:
    """Compare what math-verify parses from `gold` and `answer`. If either has an exponent above LARGEST_EXPONENT or a
    degree above LARGEST_DEGREE, they are compared unevaluated, up to the order of sums and products.
    """
    try:
        from math_verify import verify
    except ImportError as error:
        raise ConfigError("MATH is scored by math-verify, which is not installed: pip install 'hrm_megatron[evaluate]'"
                          ) from error
    if _is_huge(gold) or _is_huge(answer):
        return any(_in_order(one) == _in_order(other) for one in _parsed(gold) for other in _parsed(answer))
    return bool(verify(_parsed(gold), _parsed(answer), timeout_seconds=MATH_TIMEOUT_SECONDS))


@lru_cache(maxsize=1024)  # all answers to a question are compared pairwise
def _parsed(text: str) -> list[Any]:
    from math_verify import parse

    return list(parse(text, parsing_timeout=MATH_TIMEOUT_SECONDS))


@lru_cache(maxsize=1024)
def _is_huge(text: str) -> bool:
    """Whether a power, factorial or binomial in `text` exceeds these limits."""
    from math_verify.errors import TimeoutException
    from math_verify.utils import timeout
    from sympy import Add, Pow, exp, postorder_traversal
    from sympy.functions.combinatorial.factorials import CombinatorialFunction

    def is_huge(node: Any) -> bool:
        if not isinstance(node, Pow | exp | CombinatorialFunction):
            return False
        base, size = node.args[0], node.args[-1]  # of a binomial: the lower number
        while isinstance(base, Pow) and isinstance(node, Pow):  # a power of a power
            base, size = base.args[0], base.args[-1] * size
        if base in (0, 1, -1) or not size.is_number:
            return False
        most = LARGEST_DEGREE if base.free_symbols and base.has(Add) else LARGEST_EXPONENT
        try:
            return bool(abs(size.evalf(5)) > most)
        except (TypeError, ValueError, ArithmeticError, NotImplementedError):  # 0/0, an infinite sum
            return False
    try:  # innermost first, so that no huge part is evaluated
        return bool(timeout(MATH_TIMEOUT_SECONDS)(any)(
            is_huge(node) for each in _parsed(text) for node in postorder_traversal(each)))
    except TimeoutException:
        return True


def _in_order(node: Any) -> Any:
    """Return the unevaluated tree of a formula, with the parts of sums and products sorted."""
    from sympy import Add, Basic, Mul

    if not isinstance(node, Basic) or not node.args:
        return node
    parts = [_in_order(part) for part in node.args]
    return (node.func, *(sorted(parts, key=repr) if isinstance(node, Add | Mul) else parts))


def letter_answer(text: str, item: Item) -> Verdict:
    r"""MMLU-Pro: the last letter in parentheses, else the last standalone letter, inside \boxed{...} if there is
    one."""
    stated, letters = last_boxed(text) or text, "|".join(item.letters)
    found = re.findall(rf"\(({letters})\)", stated) or re.findall(rf"\b({letters})\b", stated)
    return _lettered(found[-1] if found else None, item)


def choice_answer(text: str, item: Item) -> Verdict:
    """Other multiple choice: the text must be the letter, upper or lower case."""
    stated = text.strip().upper()
    return _lettered(stated if stated in item.letters else None, item)


def _lettered(stated: str | None, item: Item) -> Verdict:
    if stated is None:
        return Verdict(None, (1 / len(item.letters),), invalid=True)  # the expected score of a guess
    return Verdict(stated, (float(stated == item.gold),))


def drop_answer(text: str, item: Item) -> Verdict:
    """DROP: F1 and exact match of the whole text with the best of the gold answers."""
    em, f1 = best_scores(text.strip(), item.gold)
    return Verdict(normalized(text) or None, (f1, em), invalid=not text.strip())
