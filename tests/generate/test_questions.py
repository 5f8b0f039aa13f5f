"""Questions are read from files as preprocessing reads them, and their other fields can be written again."""
import io
import json
import sys

import pytest

from hrm_megatron.config import ConfigError
from hrm_megatron.data.example import RowFormat
from hrm_megatron.data.readers.lines import jsonl_pieces
from hrm_megatron.generate.questions import of_jsonl, of_lines
from tests.tools import load_tool

QUESTIONS = ["What is 7 plus 5?", "Name the tens digit of 7543."]


def test_a_byte_order_mark_where_files_were_joined_is_no_text(single_rank, tmp_path, monkeypatch):
    """Neither in what generation reads nor in what preprocessing does."""
    rows, prompts = tmp_path / "rows.jsonl", tmp_path / "prompts.txt"
    rows.write_text("".join(f"\ufeff{json.dumps(dict(instruction=question))}\n" for question in QUESTIONS))
    prompts.write_text("".join(f"\ufeff{question}\n" for question in QUESTIONS))
    for questions in (of_jsonl(rows, "direct"), of_lines(prompts, "direct")):
        assert [question.instruction for question in questions] == QUESTIONS
    [piece] = jsonl_pieces(rows, 1 << 20, RowFormat())
    assert [row["instruction"] for _, row in piece.read(RowFormat())] == QUESTIONS
    monkeypatch.setattr(sys, "stdin", io.StringIO(prompts.read_text()))
    assert [line.rstrip("\n") for line in load_tool("generate").lines_of_input()] == QUESTIONS


@pytest.mark.parametrize("field, number", [('"loss": NaN', "NaN"), ('"a": [-1e400]', "-1e400"),
                                           ('"response": {"b": Infinity}', "Infinity")])
def test_a_number_that_json_cannot_keep_is_refused_where_fields_are_kept(tmp_path, field, number):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"instruction": "x", "a": 1e30}\n{"instruction": "x", ' + field + '}\n')
    with pytest.raises(ConfigError) as refused:
        of_jsonl(path, "direct")
    assert str(refused.value) == f"{path}:2: '{number}' is not a finite number, as JSON needs; write null or a string"
    assert len(of_jsonl(path, "direct", kept=False)) == 2


@pytest.mark.parametrize("row, key", [('{"instruction": "x", "instr\\u0075ction": "y"}', "instruction"),
                                      ('{"instruction": "x", "a": [{"b": 1, "b": 1}]}', "b")])
def test_a_field_that_is_there_twice_is_refused(tmp_path, row, key):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"instruction": "x"}}\n{row}\n')
    with pytest.raises(ConfigError) as refused:
        of_jsonl(path, "direct")
    assert str(refused.value) == f"{path}:2: has {key!r} twice; keep one"
