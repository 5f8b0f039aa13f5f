"""What is looked up of characters is what Python says of each text by itself."""
import random
import re
import unicodedata

import pytest

from hrm_megatron.data.characters import CONTROL, LOST, PRECOMPOSED, UNASSIGNED, UNSURE, VISIBLE, Texts
from tests.data.hostile import documents

INVISIBLE = re.compile(r"[\s\x00-\x1f\x7f\u00ad\u200b-\u200f\u2060\ufeff]*")
MARKS = "\u0301\u0323\u093c\u09be\u3099\u1161\u11a8\u0345\u0cd5\U00011127\u0338\u034f"
BASES = "ae<\u1100\uac00\u0928\u09c7\u3046\u1e9b\u00e9\u212b\u0958\u0344\ufb1d\n \0"


def assert_as_python_says(texts):
    looked = Texts.of(texts)
    assert looked.not_nfc.tolist() == [not unicodedata.is_normalized("NFC", text) for text in texts]
    for kind, holds in (
        (UNASSIGNED, lambda c: ord(c) >= 0xF0000 or unicodedata.category(c) == "Cn"),
        (PRECOMPOSED, lambda c: ord(c) < 0xF0000 and unicodedata.normalize("NFD", c) != c),
        (VISIBLE, lambda c: INVISIBLE.fullmatch(c) is None),
        (LOST, lambda c: c == "\ufffd"), (CONTROL, lambda c: c in "\b\t\n\f\r"),
    ):
        assert [bool(found & kind) for found in looked.kinds.tolist()] == [any(map(holds, text)) for text in texts]


def test_hostile_texts():
    assert_as_python_says([*documents(1500, seed=11), "", "\b", "lost \ufffd"])
    assert_as_python_says(["all", "ascii\n", "", " \t"])
    assert Texts.of([]).kinds.tolist() == Texts.of([]).not_nfc.tolist() == Texts.of([]).utf8 == []


def test_marks_in_every_order_behind_every_base():
    """Stretches of marks are looked at without the rest of their text, and the first may follow another text."""
    rng = random.Random(12)
    texts = [base + "".join(rng.choices(MARKS, k=count)) + end
             for base in ("", *BASES) for count in (0, 1, 1, 2, 3) for end in ("", *BASES)]
    rng.shuffle(texts)
    assert 0.2 < Texts.of(texts).not_nfc.mean() < 0.9
    assert_as_python_says(texts)


def test_every_character_that_joins_the_one_before_is_unsure():
    every = [chr(code) for code in range(0xF0000) if unicodedata.category(chr(code)) not in ("Cs", "Cn")]
    sure = [character for character, kinds in zip(every, Texts.of(every).kinds.tolist(), strict=True)
            if not kinds & UNSURE]
    assert len(sure) > 100_000 and all(unicodedata.is_normalized("NFC", character) for character in sure)
    bases = [character for character in every if unicodedata.normalize("NFD", character) != character]
    for base in {"a", "\u1100", "\uac00", *(unicodedata.normalize("NFD", one)[0] for one in bases[:2000])} & {*sure}:
        text = base + base.join(sure)
        assert unicodedata.normalize("NFC", text) == text, "a sure character joined its base"


def test_half_a_pair_is_refused():
    with pytest.raises(UnicodeEncodeError):
        _ = Texts.of(["a", "\ud800"]).kinds
