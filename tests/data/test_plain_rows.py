"""Rows that are read as columns are what the reader of single rows makes of them, or are left to it."""
import json
import random
from pathlib import Path

import pytest

from hrm_megatron.data.condition_rules import ConditionRule
from hrm_megatron.data.example import RowFormat
from hrm_megatron.data.example_batch import BATCH_CHARACTERS
from hrm_megatron.data.readers.lines import LinesPiece
from tests.data.at_once import PAIRS, columns, hold_both_ways, is_read_at_once

ROWS = RowFormat()
GOOD = {"condition": "direct", "instruction": "2 + 3? \u4f60", "response": "5\n"}
LINE = json.dumps(GOOD).encode()


def piece_of(text):
    return LinesPiece(Path("f"), len(text), 7, 0, text)


def at_once(text, rows=ROWS):
    return is_read_at_once(piece_of(text), rows)


def line(**more):
    return json.dumps({**GOOD, **more}).encode()


def with_field(value, key=b'"more"'):
    """A row with one more field, as it stands in the file."""
    return b'{%s: %s, %s' % (key, value, LINE[1:])


def test_a_plain_piece_is_read_at_once():
    assert at_once(LINE) and at_once(LINE + b"\n") and at_once(b"\n \t\r\n".join([LINE] * 3) + b"\r\n\n")
    batch = piece_of(b"\n" + LINE + b"\n\n" + line(condition="", response="x")).read_columns(ROWS)
    assert columns(batch)[:3] == (["f:8", "f:10"], ["direct", ""],
                                  [GOOD["instruction"], "5\n", GOOD["instruction"], "x"])


@pytest.mark.parametrize("text", [
    with_field(b"1"), with_field(b"-0"), with_field(b"1.5e-7"), with_field(b"1E400"), with_field(b"[]"),
    with_field(b"{}"), with_field(b'[1, "]", [null, {"instruction": 1, "response": []}], true ,false]'),
    with_field(b'{"condition" : {"response" : "\\u0000\\/"} , "a":[ ]}'), with_field(b'"\\ud83d\\ude00"'),
    with_field(b"[" * 50 + b"]" * 50), with_field(b"1", b'"instruction2"'),
    with_field(b'1, "more": [{"a": 1, "a": 2}]'), with_field(b"1", b'"instructio"'),
    with_field(b"1", b'""'), with_field(b"1", b'"\xc3\xa9"'),
    b'  {"response":"a" ,\t"instruction"\r: "b","condition":"cot"}  ',
    line(instruction='"quoted" \\ / \b\f\n\r\t \u00e9 \u20ac \U0001f600 \0 \x7f \u2028'),
    *(json.dumps({**GOOD, "instruction": "\x80 \u07ff \u0800 \ud7ff \ue000 \uffff \U00010000 \U0010ffff"},
                 ensure_ascii=escapes).encode() for escapes in (False, True)),
    line(condition="cot,synth"), line(condition=" cot , synth"), line(instruction=" \u3000x\u2003"),
])
def test_rows_that_are_read_at_once(text):
    assert at_once(text) and at_once(LINE + b"\n" + text + b"\n" + LINE)


@pytest.mark.parametrize("text", [
    b"\xef\xbb\xbf" + LINE, LINE + LINE, LINE + b" " + LINE, LINE + b",", LINE[:-1], LINE[:-1] + b",}", LINE + b"}",
    b"[" + LINE + b"]", LINE.replace(b", ", b",\n", 1), LINE.replace(b": ", b":\n", 1), LINE + b" // so", b"# so",
    b"1", b"null", b'"text"', b"{}", b"{", b"}", b"\0", b"\x0b" + LINE, LINE + b"\x0c", b"\xc2\xa0" + LINE,
    with_field(b"1", b'"response"'), with_field(b'"x"', b'"response"'), with_field(b'"x"', b'"respons\\u0065"'),
    with_field(b'"", "input": ""', b'"input"'), with_field(b'null, "system": ""', b'"system"'),
    with_field(b"1", b"'more'"), with_field(b"1", b"more"), with_field(b"1", b'"\xff"'), with_field(b"1", b'"a\tb"'),
    *map(with_field, (b"NaN", b"Infinity", b"-Infinity", b"nul", b"nulll", b"True", b"01", b"1.", b".5", b"+1", b"1e",
                      b"-", b"0x1", b"1_0", b"", b"9" * 5000, b"[" * 100_000, b"[" * 5000 + b"]" * 5000, b"[1,]",
                      b"[,1]", b"[1 2]", b"{1: 2}", b'{"a"}', b'{"a":}', b'{"a": 1,}', b"[}", b"{]", b"[1}",
                      b'["a": 1]', b'"\\x41"', b'"\\u12"', b'"\\u123g"', b'"\\u+123"', b'"a\tb"', b'"\x00"',
                      b'"\\ud800"',
                      b'"\\udc00"', b'"\\ud800\\ud800"', b'"\\ud800\\u0041"', b'"\\ud800\\n"', b'"\\ude00\\ud83d"',
                      b'"\\udc00\\udc00"', b'{"a":' * 5000 + b"1" + b"}" * 5000,
                      b'"\xed\xa0\x80"', b'"\xc0\x80"', b'"\xe0\x9f\xbf"', b'"\xf0\x8f\xbf\xbf"', b'"\xf4\x90\x80\x80"',
                      b'"\xf5\x80\x80\x80"', b'"\x80"', b'"\xe2\x82"', b'"\xc3"', b'"\xf0\x9f\x98"')),
    *(line(**{key: value}) for key in ("instruction", "response")
      for value in (None, 1, [], ["x"], {}, True, "", " ", "\n\u3000\x1c\x85", "a\ud800", "\udfff")),
    line(condition=None), line(condition=["cot"]), line(condition="loud"), line(condition="direct,"),
    b'{"instruction": "a", "response": "b"}', b'{"condition": "cot", "response": "b"}', line(condition="\ud800"),
    b'{"condition": "cot", "instruction": "a"}', b'{"messages": [{"role": "user", "content": "a"}]}',
    b'{"condition": "c\\u006ft", "instruction": "a", "response": "b"}',
    b'{"instruction": "a", "input": "b", "output": "c"}', line(input="b"), line(context="c"), line(system=" "),
    line(**dict.fromkeys(("instruction", "response"), "x" * (BATCH_CHARACTERS // 2))),
], ids=lambda text: repr(text[:30]))
def test_rows_that_are_left_to_the_reader_of_single_rows(text):
    for whole in (text, LINE + b"\n" + text + b"\n" + LINE, LINE + b"\n" + text):
        assert not at_once(whole)


@pytest.mark.parametrize("rows, text, taken", [
    (RowFormat(default_condition="cot,synth"), b'{"instruction": "a", "response": "b"}\n' + LINE, True),
    (RowFormat(default_condition=""), b'{"instruction": "a", "response": "b"}\n' + LINE, True),
    (RowFormat(default_condition="cot"), line(condition=None), False),
    (RowFormat(default_condition="cot", condition_rules=(ConditionRule("synth"),)), LINE, True),
    (RowFormat(default_condition="cot", condition_rules=(ConditionRule("synth"),)),
     b'{"instruction": "a", "response": "b"}', False),
    (RowFormat(tags=("loud",)), LINE, False), (RowFormat(tags=("loud",)), line(condition="loud"), True),
    (RowFormat(tags=("c\\u006ft",)), line(condition="cot").replace(b"cot", b"c\\u006ft"), False),
    (RowFormat(("t\u00e4gs", "q", "a")), '{"q": "a", "a": "b", "t\u00e4gs": "cot", "instruction": 3}'.encode(), True),
    (RowFormat(("t", "q\n", "a")), b'{"q\\n": "a", "a": "b", "t": "cot"}', False),
    (RowFormat(("t", 'q"', "a")), b'{"q\\"": "a", "a": "b", "t": "cot"}', False),
    (RowFormat(("t", "q", "q")), b'{"q": "a", "t": "cot"}', False),
    (RowFormat(("t", "\udcff", "a")), b'{"\xff": "a", "a": "b", "t": "cot"}', False),
    (RowFormat(shape="alpaca"), b'{"condition": "cot", "instruction": "a", "output": "c", "response": "d"}', False),
    (RowFormat(max_characters=len(GOOD["instruction"]) - 1), LINE, False),
    (RowFormat(max_characters=99), LINE, True), (RowFormat(ignored_fields=("input",)), line(input="b"), True),
    (RowFormat(), line(input="", system=None, tools=None), True), (RowFormat(), line(input="", context=False), False),
    (RowFormat(("condition", "input", "system")), line(input="b", system="c"), True),
    (RowFormat(max_characters=1), b'{"condition": "cot", "instruction": "a", "response": "b"}' + b" " * 65_600, False),
    (RowFormat(max_characters=1), b" " * 65_600 + b"\n" + LINE, False),
])
def test_rows_of_another_format(rows, text, taken):
    assert at_once(text, rows) == taken


def random_value(rng, depth=0):
    kind = rng.randrange(8 if depth < 4 else 6)
    if kind > 5:
        values = [random_value(rng, depth + 1) for _ in range(rng.randrange(4))]
        return values if kind == 6 else {rng.choice(("a", "condition", "response", "\u00e9")): v for v in values}
    return (None, True, rng.randrange(-9, 9), rng.uniform(-1e9, 1e9), "x", random_text(rng))[kind]


def random_text(rng):
    characters = "aZ \n\t\"\\/\b\0\x7f\u00e9\u0301\u3000\u4f60\uffff\U0001f600{}[]:,"
    return "".join(rng.choices(characters, k=rng.randint(0, 9)))


def random_line(rng):
    row = {"condition": rng.choice(("", "cot", "cot,synth")), "instruction": random_text(rng) + "q",
           "response": random_text(rng) + "a"}
    row |= {rng.choice(("id", "meta", "Response")): random_value(rng) for _ in range(rng.randrange(3))}
    items = list(row.items())
    rng.shuffle(items)
    separators = rng.choice(((",", ":"), (", ", ": "), (" \t,", "\r: ")))
    return json.dumps(dict(items), ensure_ascii=rng.random() < 0.5, separators=separators).encode()


PARTS = (b'"', b"\\", b"{", b"}", b"[", b"]", b":", b",", b"\n", b"\r\n", b" ", b"\t", b"\0", b"\xff", b"\x80",
         b"\xc3", b"//", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\xc2\xa0", b"\\ud800", b"\\udc00", b"\\u", b"\\n", b"\\x",
         b"0", b"-", b".", b"e", b"1", b"NaN", b"null", b"true", b"condition", b"response", b'"response":"b",',
         b'"id":[')


def mutated(rng, text):
    for _ in range(rng.choice((0, 0, 1, 1, 1, 2))):
        start = rng.randrange(len(text) + 1)
        end = min(len(text), start + rng.choice((0, 0, 0, 1, 1, 2, 9)))
        part = rng.choice(PARTS) if rng.random() < 0.7 else text[start:start + rng.randrange(12)]
        text = text[:start] + part + text[end:]
    return text


@pytest.mark.parametrize("count, seed", [(4000, 1), pytest.param(1_000_000, 2, marks=pytest.mark.slow)])
def test_lines_that_were_changed_at_random(count, seed):
    rng = random.Random(seed)
    rows = (ROWS, RowFormat(default_condition="cot"), RowFormat(max_characters=30))
    taken = sum(at_once(mutated(rng, b"\n".join(random_line(rng) for _ in range(rng.randint(1, 2)))), rng.choice(rows))
                for _ in range(count))
    assert 0.2 * count < taken < 0.8 * count, "one of the two ways is hardly tried"


def test_what_becomes_of_a_piece_does_not_depend_on_the_way(tokenizer, tmp_path, monkeypatch):
    lines = [json.dumps(dict(condition="cot", instruction=q, response=a), ensure_ascii=False) for q, a in PAIRS]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([*lines, ""]), encoding="utf-8")
    hold_both_ways(tokenizer, path, RowFormat(default_condition="synth"), monkeypatch)
