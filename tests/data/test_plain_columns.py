"""Columns of Parquet and Arrow that are read as texts at once are what the reader of single rows makes of them."""
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hrm_megatron.data.condition_rules import ConditionRule
from hrm_megatron.data.example import RowFormat
from hrm_megatron.data.example_batch import BATCH_CHARACTERS
from hrm_megatron.data.readers.columns import ColumnsPiece, Part
from tests.data.at_once import PAIRS, columns, hold_both_ways, is_read_at_once

ROWS = RowFormat()
GOOD = {"condition": "direct", "instruction": "2 + 3? \u4f60", "response": "5\n"}


def piece_of(table, long_row_bytes=0):
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return ColumnsPiece(Path("f"), 9, "row group 3", 7, Part(table.num_rows, sink.getvalue().to_pybytes(),
                                                             long_row_bytes))


def table_of(*rows, **columns):
    """These rows between good ones; columns in place of theirs."""
    table = pa.Table.from_pylist([GOOD, *({**GOOD, **row} for row in rows), GOOD])
    for name, column in columns.items():
        if name in table.column_names:
            table = table.drop_columns(name)
        if column is not None:
            table = table.append_column(name, pa.array(column) if isinstance(column, list) else column)
    return table


def octets(*texts):
    return pa.array(texts, pa.binary()).view(pa.string())


def test_a_plain_piece_is_read_at_once():
    table = table_of(dict(condition="", response="x"))
    assert columns(piece_of(table).read_columns(ROWS))[:3] == (
        [f"f:row group 3, row {i}" for i in (7, 8, 9)], ["direct", "", "direct"],
        [GOOD["instruction"], "5\n", GOOD["instruction"], "x", GOOD["instruction"], "5\n"])
    assert is_read_at_once(piece_of(table)) and is_read_at_once(piece_of(pa.concat_tables([table, table])))
    assert not is_read_at_once(piece_of(table, long_row_bytes=1 << 30)) and not is_read_at_once(piece_of(table[:0]))


@pytest.mark.parametrize("table", [
    table_of(dict(instruction="a\0b", response="\0")), table_of(dict(instruction="\U0010ffff\ud7ff\ue000")),
    table_of(dict(condition="cot,synth"), dict(condition=" cot , synth")), table_of(dict(response=" \u3000x\u2003")),
    table_of(instruction=pa.array(["a", "b"], pa.large_string()), condition=pa.array(["", ""], pa.large_string())),
    table_of(system=[None, None], input=["", None], context=pa.array(["", ""], pa.large_string())),
    table_of(tools=pa.array([None, None], pa.list_(pa.string()))),
    table_of(more=[b"\xff", b""], other=[[1], []]), table_of().select(["response", "condition", "instruction"]),
    table_of(instruction=pa.array(["cut", "a", "b"])[1:], response=pa.array(["a", "b", "cut"])[:2]),
])
def test_columns_that_are_read_at_once(table):
    assert is_read_at_once(piece_of(table))


@pytest.mark.parametrize("table", [
    *(table_of({key: value}) for key in ("instruction", "response")
      for value in (None, "", " ", "\n\u3000\x1c\x85", "x" * BATCH_CHARACTERS)),
    table_of(dict(instruction="x" * (BATCH_CHARACTERS // 2), response="y" * (BATCH_CHARACTERS // 2))),
    *(table_of(**{key: octets("a", text)}) for key in ("condition", "instruction", "response")
      for text in (b"\xff", b"caf\xe9", b"\xed\xa0\x80", b"\xc0\x80", b"\xf4\x90\x80\x80", b"\x80")),
    # Two halves of a character, each in a text of its own.
    table_of(instruction=octets("a", b"\xc3"), response=octets("a", b"\xa9")),
    table_of(input=["a", "b"]), table_of(context=["a", "b"]), table_of(system=[None, "a"]),
    table_of(tools=[["a"], None]), table_of(context=[" ", ""]),
    table_of(dict(condition=None)), table_of(dict(condition="loud")), table_of(dict(condition="direct,")),
    *(table_of(**{key: None}) for key in GOOD), *(table_of(**{key: column}) for key in GOOD for column in (
        [1, 2], [b"a", b"b"], [["a"], ["b"]], [{"a": "b"}] * 2, [None, None], pa.array(["a", "b"], pa.string_view()))),
])
def test_columns_that_are_left_to_the_reader_of_single_rows(table):
    assert not is_read_at_once(piece_of(table))


@pytest.mark.parametrize("rows, table, taken", [
    (RowFormat(default_condition="cot,synth"), table_of(dict(condition=None)), True),
    (RowFormat(default_condition=""), table_of(condition=None), True),
    (RowFormat(default_condition="cot"), table_of(condition=[None, None]), False),  # of a type without texts
    (RowFormat(default_condition="cot", condition_rules=(ConditionRule("synth"),)), table_of(), True),
    (RowFormat(default_condition="cot", condition_rules=(ConditionRule("synth"),)), table_of(condition=None), False),
    (RowFormat(tags=("loud",)), table_of(), False),
    (RowFormat(tags=("loud",)), table_of(condition=["loud", ""]), True),
    (RowFormat(tags=("\u00e9",)), table_of(condition=["\u00e9", ""]), True),
    (RowFormat(("t\u00e4gs", "q", "a")), pa.table({"a": ["b"], "q": ["c"], "t\u00e4gs": ["cot"]}), True),
    (RowFormat(("t", "q", "q")), pa.table({"q": ["c"], "t": ["cot"]}), True),
    (RowFormat(shape="alpaca"), table_of(output=["a", "b"]), False),
    (RowFormat(max_characters=len(GOOD["instruction"]) - 1), table_of(), False),
    (RowFormat(max_characters=99), table_of(), True),
])
def test_columns_of_another_format(rows, table, taken):
    assert is_read_at_once(piece_of(table), rows) == taken


def random_column(rng, count, bad):
    """Texts of any kind, with white space and bytes that are no UTF-8 where they are to be bad."""
    pool = [*"aZ \n\0\u00e9\u0301\u3000\u4f60\uffff\U0001f600"]
    texts = ["".join(rng.choices(pool, k=rng.randint(0, 5))) + ("" if bad else "x") for _ in range(count)]
    found = [None if bad and rng.random() < 0.05 else text.encode() + (b"\x80" if bad and rng.random() < 0.05 else b"")
             for text in texts]
    start = rng.randrange(3)
    small = pa.array([b"cut"] * start + found, pa.binary())[start:].view(pa.string())
    return pa.array(found, pa.large_binary()).view(pa.large_string()) if rng.random() < 0.3 else small


def test_columns_at_random():
    rng = random.Random(5)
    taken = 0
    for _ in range(2000):
        count, bad = rng.randint(1, 4), rng.random() < 0.5
        names = ["instruction", "response", *rng.sample(["condition"], rng.randrange(2))]
        found = {name: random_column(rng, count, bad) for name in names}
        if "condition" in found:
            found["condition"] = pa.array(rng.choices(["", "cot", "cot,synth", None], k=count), pa.string())
        rows = rng.choice((ROWS, RowFormat(default_condition="cot"), RowFormat(default_condition="",
                                                                               max_characters=9)))
        taken += is_read_at_once(piece_of(pa.table(found)), rows)
    assert 400 < taken < 1600, "one of the two ways is hardly tried"


def test_what_becomes_of_a_piece_does_not_depend_on_the_way(tokenizer, tmp_path, monkeypatch):
    table = pa.Table.from_pylist([dict(condition="cot" if i % 2 else None, instruction=q, response=a)
                                  for i, (q, a) in enumerate(PAIRS)])
    pq.write_table(table, tmp_path / "rows.parquet")
    encoded = hold_both_ways(tokenizer, tmp_path / "rows.parquet", RowFormat(default_condition="synth"), monkeypatch)
    assert encoded.defaulted > 100
