import json
import pickle
from pathlib import Path

import pytest

from hrm_megatron.config import ConfigError
from hrm_megatron.data.condition_rules import ConditionRule
from hrm_megatron.data.example import BadRow, BadRows, Example, RawText, RowFormat, parse_object
from hrm_megatron.data.readers import read_examples
from hrm_megatron.data.row_shapes import examples_of

GOOD = {"condition": "direct", "instruction": "2 + 3?", "response": "5"}


def test_rows_are_read_with_their_line_numbers(write_jsonl):
    path = write_jsonl("a.jsonl", [GOOD, "", "   ", {**GOOD, "condition": "", "more": 1},
                                   {**GOOD, "instruction": "line\u2028\nend"}])
    assert list(read_examples([path])) == [
        (f"{path}:1", Example("direct", "2 + 3?", "5")), (f"{path}:4", Example("", "2 + 3?", "5")),
        (f"{path}:5", Example("direct", "line\u2028\nend", "5"))]


def test_keys_can_be_named(write_jsonl):
    path = write_jsonl("a.jsonl", [{"tags": "cot,synth", "q": "why?", "a": "so"}])
    assert list(read_examples([path], RowFormat(("tags", "q", "a")))) == [
        (f"{path}:1", Example("cot,synth", "why?", "so"))]


@pytest.mark.parametrize("raw", [None, RawText((0.1, 0.5), 7, Path("punkt"), "a1", "body")])
def test_every_setting_is_what_json_makes_of_it(raw):
    """Else a dataset that was written with it would be one of other settings."""
    rows = RowFormat(("tags", "q", "a"), "cot", 99, ("cot", "direct"), "fields", raw,
                     (ConditionRule("direct", "x", "y"), ConditionRule("cot")))
    assert len(rows.settings()) == (9 if raw else 5)
    assert json.loads(json.dumps(rows.settings())) == rows.settings()


BAD_ROWS = [
    ('{"condition": "direct" 1', "broken JSON", ["column 24", "correct the line"]),
    (b'{"condition": "\xff"}', "not UTF-8", ["invalid start byte at byte 15", "correct the line", "iconv -f LATIN1"]),
    ("[" * 100_000, "broken JSON", ["[[["]),
    ("9" * 5_000, "broken JSON", ["999"]),
    ("[1, 2]", "broken JSON", ["[1, 2]", "one object per line"]),
    ({"condition": "direct", "response": "5"}, "missing field", ["'instruction'", "--json-keys"]),
    ({"instruction": "2 + 3?", "response": "5"}, "missing field",
     ["'condition'", "--json-keys", "--default-condition"]),
    ({**GOOD, "response": 5}, "field is no string", ["response=5", "quotes"]),
    ({**GOOD, "condition": None}, "null field", ["condition is null; fill it or drop the row", "--default-condition"]),
    ({**GOOD, "response": None}, "null field", ["response is null; fill it or drop the row"]),
    ({**GOOD, "instruction": ["x"] * 99}, "field is no string", ["instruction=['x', 'x'", "...", "one text"]),
    ({**GOOD, "condition": "direct,Cot"}, "unknown tag", ["'Cot'", "direct, cot, noisy, synth"]),
    ({**GOOD, "condition": "direct,"}, "unknown tag", ["''"]),
    ({**GOOD, "condition": "loud" * 100_000}, "unknown tag", ["'loudloud", "...", "direct, cot, noisy, synth"]),
    ({**GOOD, "instruction": ""}, "empty field", ["instruction=''", "drop the row"]),
    ({**GOOD, "response": " \n"}, "empty field", [r"response=' \n'"]),
    ({**GOOD, "response": "a\ud800"}, "invalid Unicode", ["response", "character 2"]),
    (f'{{"instruction": "first", {json.dumps(GOOD)[1:]}', "field twice", ["has 'instruction' twice; keep one"]),
    (f'{{"instr\\u0075ction": "first", {json.dumps(GOOD)[1:]}', "field twice", ["has 'instruction' twice"]),
    (f'{{"input": "", "input": "", {json.dumps(GOOD)[1:]}', "field twice", ["has 'input' twice"]),
    (f'{{"history": "", "history": "", {json.dumps(GOOD)[1:]}', "lost field", ["history=(there twice) belongs to"]),
]


@pytest.mark.parametrize("row, kind, parts", BAD_ROWS)
def test_bad_rows_name_place_value_and_way_out(write_jsonl, row, kind, parts):
    path = write_jsonl("rows.jsonl", [GOOD, "", row])
    rows = read_examples([path])
    assert next(rows)[0] == f"{path}:1"
    with pytest.raises(BadRow) as refusal:
        next(rows)
    message = str(refusal.value)
    assert refusal.value.kind == kind and message.startswith(f"{path}:3: ")
    assert all(part in message for part in parts), message
    assert len(message.splitlines()) == 1 and len(message) < 400 + len(str(path))


def test_a_bad_row_survives_the_way_from_a_worker():
    with pytest.raises(BadRow) as refusal:
        parse_object(b"{", "x.jsonl:7")
    copy = pickle.loads(pickle.dumps(refusal.value))
    assert (type(copy), copy.kind, str(copy)) == (BadRow, "broken JSON", str(refusal.value))


def test_null_is_never_put_in_quotes():
    for key in GOOD:
        with pytest.raises(BadRow) as refusal:
            examples_of({**GOOD, key: None}, "x.jsonl:7", RowFormat())
        assert "quotes" not in str(refusal.value) and ("--default" in str(refusal.value)) == (key == "condition")


@pytest.mark.parametrize("row, condition", [
    ({"instruction": "2 + 3?", "response": "5"}, "cot,synth"), ({**GOOD, "condition": None}, "cot,synth"),
    ({**GOOD, "condition": ""}, ""), (GOOD, "direct")])
def test_a_row_without_condition_takes_the_default(row, condition):
    example, = examples_of(row, "x:1", RowFormat(default_condition="cot,synth"))
    assert (example.condition, example.defaulted) == (condition, condition == "cot,synth")


def test_a_default_condition_of_no_tags_is_one_and_an_unknown_tag_none():
    row = {"instruction": "2 + 3?", "response": "5"}
    assert examples_of(row, "x:1", RowFormat(default_condition="")) == [Example("", "2 + 3?", "5")]
    with pytest.raises(ConfigError, match="--default-condition direct,loud: unknown tag 'loud'"):
        RowFormat(default_condition="direct,loud")


def test_a_byte_order_mark_is_stripped_wherever_files_were_joined(write_jsonl):
    mark, row = b"\xef\xbb\xbf", json.dumps(GOOD).encode()
    path = write_jsonl("a.jsonl", [mark + row, row, mark + row, mark, mark + b"  " + row])
    assert list(read_examples([path])) == [(f"{path}:{number}", Example(**GOOD)) for number in (1, 2, 3, 5)]
    inside = {**GOOD, "instruction": "a\ufeffb"}
    assert parse_object(json.dumps(inside, ensure_ascii=False).encode(), "x:1") == inside


def test_bad_rows_are_counted_by_kind_or_raised(write_jsonl):
    path = write_jsonl("a.jsonl", ["{", GOOD, {**GOOD, "response": ""}, "{"])
    skipped = BadRows(skip=True)
    assert [place for place, _ in read_examples([path], bad_rows=skipped)] == [f"{path}:2"]
    broken, empty = skipped.lines()
    assert broken.startswith(f"skipped 2: broken JSON, first {path}:1: ")
    assert empty.startswith(f"skipped 1: empty field, first {path}:3: ")
    with pytest.raises(BadRow, match="a.jsonl:1: "):
        list(read_examples([path], bad_rows=BadRows()))
