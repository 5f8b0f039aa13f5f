import json
import pickle

import pytest

from hrm_megatron.config import ConfigError
from hrm_megatron.data.example import BadRow, Example, find_inputs, parse_example, read_jsonl

GOOD = {"condition": "direct", "instruction": "2 + 3?", "response": "5"}


def test_rows_are_read_with_their_line_numbers(write_jsonl):
    path = write_jsonl("a.jsonl", [GOOD, "", "   ", {**GOOD, "condition": "", "more": 1},
                                   {**GOOD, "instruction": "line\u2028\nend"}])
    assert list(read_jsonl(path)) == [
        (1, Example("direct", "2 + 3?", "5")), (4, Example("", "2 + 3?", "5")),
        (5, Example("direct", "line\u2028\nend", "5"))]


def test_keys_can_be_named(write_jsonl):
    path = write_jsonl("a.jsonl", [{"tags": "cot,synth", "q": "why?", "a": "so"}])
    assert list(read_jsonl(path, ("tags", "q", "a"))) == [(1, Example("cot,synth", "why?", "so"))]


BAD_ROWS = [
    ('{"condition": "direct" 1', "broken JSON", ["column 24", "correct the line"]),
    (b'{"condition": "\xff"}', "broken JSON", ["utf-8", "correct the line"]),
    ("[" * 100_000, "broken JSON", ["[[["]),
    ("9" * 5_000, "broken JSON", ["999"]),
    ("[1, 2]", "broken JSON", ["[1, 2]", "one object per line"]),
    ({"condition": "direct", "response": "5"}, "missing field", ["'instruction'", "--json-keys"]),
    ({"instruction": "2 + 3?", "response": "5"}, "missing field", ["'condition'", "--json-keys"]),
    ({**GOOD, "response": 5}, "field is no string", ["response=5", "quotes"]),
    ({**GOOD, "condition": None}, "field is no string", ["condition=None"]),
    ({**GOOD, "instruction": ["x"] * 99}, "field is no string", ["instruction=['x', 'x'", "..."]),
    ({**GOOD, "condition": "direct,Cot"}, "unknown tag", ["'Cot'", "direct, cot, noisy, synth"]),
    ({**GOOD, "condition": "direct,"}, "unknown tag", ["''"]),
    ({**GOOD, "instruction": ""}, "empty field", ["instruction=''", "drop the row"]),
    ({**GOOD, "response": " \n"}, "empty field", [r"response=' \n'"]),
    ({**GOOD, "response": "a\ud800"}, "invalid Unicode", ["response", "character 2"]),
]


@pytest.mark.parametrize("row, kind, parts", BAD_ROWS)
def test_bad_rows_name_place_value_and_way_out(write_jsonl, row, kind, parts):
    path = write_jsonl("rows.jsonl", [GOOD, "", row])
    rows = read_jsonl(path)
    assert next(rows)[0] == 1
    with pytest.raises(BadRow) as refusal:
        next(rows)
    message = str(refusal.value)
    assert refusal.value.kind == kind and message.startswith(f"{path}:3: ")
    assert all(part in message for part in parts), message
    assert len(message.splitlines()) == 1 and len(message) < 400 + len(str(path))


def test_a_bad_row_survives_the_way_from_a_worker():
    with pytest.raises(BadRow) as refusal:
        parse_example(b"{", "x.jsonl:7")
    copy = pickle.loads(pickle.dumps(refusal.value))
    assert (type(copy), copy.kind, str(copy)) == (BadRow, "broken JSON", str(refusal.value))


def test_inputs_are_files_globs_and_folders(write_jsonl, tmp_path):
    b, a, deep = (write_jsonl(name, [GOOD]) for name in ("b.jsonl", "a.jsonl", "sub/deep/c.jsonl"))
    text = write_jsonl("notes.txt", [json.dumps(GOOD)])
    assert find_inputs([str(tmp_path)]) == [a, b, deep]
    assert find_inputs([str(b), str(tmp_path / "?.jsonl")]) == [b, a]
    assert find_inputs([str(text)]) == [text]
    assert find_inputs([str(tmp_path / "**/c.jsonl")]) == [deep]


@pytest.mark.parametrize("name, message", [
    ("absent.jsonl", "absent.jsonl matches no file"), ("*.parquet", "parquet matches no file"),
    ("empty", "empty has no .*jsonl"),
])
def test_inputs_that_match_nothing_are_refused(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=message):
        find_inputs([str(tmp_path / name)])
