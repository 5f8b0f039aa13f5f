"""Fields, alpaca rows and chats become the same examples; shapes are told from the first row and never mixed."""
import json
import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from hrm_megatron.data.example import BadRow, Example, RowFormat, parse_object
from hrm_megatron.data.example_batch import ExampleBatch
from hrm_megatron.data.row_shapes import SHAPES, examples_of, fields_to_read, shape_of
from hrm_megatron.data.text_keys import TextKeys

ROOT = Path(__file__).parents[2]
CHAT = RowFormat(default_condition="", shape="messages")
Q, A, SYSTEM = ({"role": role, "content": content} for role, content in
                (("user", "2 + 3?"), ("assistant", "5"), ("system", "Be brief.")))


def turn(role, content, **more):
    return {"role": role, "content": content, **more}


def chat(*turns, noted=None):
    return [(example.instruction, example.response)
            for example in examples_of({"messages": list(turns)}, "x:1", CHAT, noted)]


@pytest.mark.parametrize("row, shape", [
    ({"instruction": "2 + 3?", "response": "5"}, "fields"),
    ({"instruction": "2 + 3?", "output": "5"}, "alpaca"),
    ({"instruction": "2 + 3?", "input": "", "output": "5"}, "alpaca"),
    ({"instruction": "2 + 3?", "input": None, "output": "5"}, "alpaca"), ({"messages": [Q, A]}, "messages"),
    ({"conversations": [{"from": "human", "value": "2 + 3?"}, {"from": "gpt", "value": "5"}]}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "2 +"}, {"type": "text", "text": " 3?"}]}, A]},
     "messages"),
    ({"messages": [{**Q, "from": None, "value": None, "tool_calls": None}, A], "conversations": None}, "messages")])
def test_a_question_and_its_answer_are_one_example_in_every_shape(row, shape):
    rows = RowFormat(default_condition="direct", shape=shape)
    assert examples_of(row, "x:1", rows) == [Example("direct", "2 + 3?", "5", True)]
    assert examples_of({**row, "condition": "cot"}, "x:1", rows) == [Example("cot", "2 + 3?", "5")]
    with pytest.raises(BadRow, match="x:1: no field 'condition'.*--default-condition"):
        examples_of(row, "x:1", RowFormat(shape=shape))


def test_an_input_stands_behind_its_instruction():
    row = {"instruction": "Translate.", "input": "le chat\n", "output": "the cat"}
    assert examples_of(row, "x", RowFormat(default_condition="", shape="alpaca")) == [
        Example("", "Translate.\n\nle chat\n", "the cat")]


def test_every_answer_is_an_example_with_all_before_it_in_the_prefix():
    assert chat(SYSTEM, Q, A, turn("user", "And 4?"), turn("assistant", "9")) == [
        ("Be brief.\n\n2 + 3?", "5"),
        ("Be brief.\n\nUser: 2 + 3?\n\nAssistant: 5\n\nUser: And 4?", "9")]
    assert chat(Q, A, Q, A)[1] == ("User: 2 + 3?\n\nAssistant: 5\n\nUser: 2 + 3?", "5")
    assert chat(turn("system", " "), Q, A) == chat(Q, A)


def test_turns_out_of_the_common_order_are_kept_and_counted():
    noted = Counter()
    assert chat(turn("assistant", "Hello."), Q, turn("user", "Quick!"), A, A, turn("tool", ""), SYSTEM,
                turn("assistant", "six"), Q, noted=noted) == [
        ("Assistant: Hello.\n\nUser: 2 + 3?\n\nUser: Quick!", "5"),
        ("Assistant: Hello.\n\nUser: 2 + 3?\n\nUser: Quick!\n\nAssistant: 5", "5"),
        ("Assistant: Hello.\n\nUser: 2 + 3?\n\nUser: Quick!\n\nAssistant: 5\n\nAssistant: 5\n\nTool: \n\n"
         "System: Be brief.", "six")]
    assert noted == {"turns of the assistant before any question, kept in prefixes": 1,
                     "turns of the user behind another of the same": 1,
                     "turns of the assistant behind another of the same": 1, "turns of tools, kept in prefixes": 1,
                     "turns behind the last of the assistant, left out": 1}


def test_masked_answers_are_in_prefixes_and_are_not_learned():
    noted = Counter()
    turns = [Q, turn("assistant", "6", weight=0), turn("user", "Sure?"), turn("assistant", "5", weight=1, train=None),
             turn("user", "Why?"), turn("assistant", "So.", loss=False)]
    assert chat(*turns, noted=noted) == [("User: 2 + 3?\n\nAssistant: 6\n\nUser: Sure?", "5")]
    assert noted == {"turns of the assistant that are masked, kept in prefixes": 1,
                     "turns behind the last of the assistant, left out": 2}
    with pytest.raises(BadRow, match="x:1: the assistant answers nothing; weight or train or loss masks all of its"):
        chat(Q, turn("assistant", "5", train=False))


def test_all_answers_of_a_chat_are_split_by_its_first_question():
    first, masked = Example("", "2 + 3?", "5"), turn("assistant", "5", weight=0)
    for answer in (A, masked):
        row = {"messages": [Q, answer, turn("user", "And 4?"), turn("assistant", "9"), Q, A]}
        batch = ExampleBatch.of(("x:1", example) for example in [first, *examples_of(row, "x:1", CHAT)])
        keys = TextKeys()
        keys.add(batch, range(len(batch.conditions)))
        prompts, whole = keys.arrays()
        assert len(prompts) == (4 if answer is A else 3) and len({*prompts.tolist()}) == 1
        assert len({*whole[1:, 0].tolist()}) == len(prompts) - 1


BAD_CHATS = [
    ("hello", "no turns", "messages='hello' is not a list of turns"), ([], "no turns", "is not a list of turns"),
    (["hello"], "no turns", "x:1, messages[0]: 'hello' is not a turn"),
    ([Q], "no answer", "no turn of the assistant"), ([SYSTEM, A], "no answer", "answers nothing"),
    ([turn(None, "a"), A], "unknown role", "messages[0]: role=None; use one of system, "),
    ([Q, turn("narrator", "a")], "unknown role", "messages[1]: role='narrator'"),
    ([{"text": "a"}, A], "unknown role", "role=None"), ([turn(["user"], "a")], "unknown role", "role=['user']"),
    ([turn("user", " "), A], "empty turn", "messages[0]: content=' ' is empty"),
    ([Q, turn("assistant", "")], "empty turn", "messages[1]: content='' is empty"),
    ([Q, turn("assistant", None)], "null field", "content is null"),
    ([{"role": "user"}, A], "missing field", "content"),
    ([Q, turn("assistant", "", tool_calls=[{"name": "f"}])], "tool call", "tool_calls would be lost"),
    ([Q, turn("assistant", "5", reasoning_content="2, then 3")], "thought", "reasoning_content would be lost; write"),
    ([Q, turn("assistant", "5", thinking=["2"])], "thought", "messages[1]: thinking would be lost; write the thought"),
    ([Q, turn("assistant", "5", refusal="No.")], "refusal", "refusal would be lost; write the refusal into"),
    ([Q, turn("assistant", "5", weight=0.5)], "unknown weight", "messages[1]: weight=0.5 is neither 0 (no loss) nor 1"),
    ([turn("user", [{"type": "image", "url": "u"}]), A], "turn is no text", "image"),
    ([turn("user", "a\ud800"), A], "invalid Unicode", "half a surrogate pair"),
    (b'{"messages": [{"role": "user", "content": "a", "content": "b"}]}', "field twice", "[0]: has 'content' twice"),
    (b'{"messages": [], "messages": []}', "no turns", "messages=(there twice) is not a list of turns"),
    ([turn("user", "a" * 101), A], "row too long", "a text of 101 characters"),
]


@pytest.mark.parametrize("turns, kind, message", BAD_CHATS)
def test_bad_chats_name_place_value_and_way_out(turns, kind, message):
    noted = Counter()
    row = parse_object(turns if isinstance(turns, bytes) else json.dumps({"messages": turns}).encode(), "x:1")
    with pytest.raises(BadRow) as refusal:
        examples_of(row, "x:1", RowFormat(default_condition="", shape="messages", max_characters=100),
                    noted)
    assert refusal.value.kind == kind and message in str(refusal.value), str(refusal.value)
    assert str(refusal.value).startswith("x:1") and "\n" not in str(refusal.value)
    assert not noted


def test_a_chat_whose_prefixes_grow_beyond_measure_is_one_bad_row():
    turns = [turn("user", "a"), turn("assistant", "b")] * 25
    longest, total = len(chat(*turns)[-1][0]), sum(len(prefix) for prefix, _ in chat(*turns))
    assert longest < 600 and 6000 < total
    for max_characters, refused in ((600, True), (-(-total // 10), False)):
        rows = RowFormat(default_condition="", shape="messages", max_characters=max_characters)
        if refused:
            with pytest.raises(BadRow, match="x:1: a chat whose prefixes have over 10 x --max-characters 600"):
                examples_of({"messages": turns}, "x:1", rows)
        else:
            assert len(examples_of({"messages": turns}, "x:1", rows)) == 25


@pytest.mark.parametrize("row, shape, prefix", [
    ({"instruction": "Sum up.", "input": "A text.", "response": "5"}, "fields", "Sum up.\n\nA text."),
    ({"instruction": "a?", "response": "5", "system_prompt": "Be brief.", "context": " ", "tools": "[]"}, "fields",
     "Be brief.\n\na?"),
    ({"instruction": "a?", "input": "b", "output": "5", "system": "Be brief.", "history": []}, "alpaca",
     "Be brief.\n\na?\n\nb"),
    ({"instruction": "Sort it.", "input": "[]", "output": "5", "system": None}, "alpaca", "Sort it.\n\n[]"),
    ({"messages": [Q, A], "system": "Be brief.", "tools": None}, "messages", "Be brief.\n\n2 + 3?"),
    ({"instruction": "a?", "response": "5", "context": {"a": None}, "tools": [{"a": None, "b": ""}]}, "fields", "a?"),
    ({"instruction": "a?", "output": "5", "system": "Be brief.", "system_prompt": "Be brief."}, "alpaca",
     "Be brief.\n\na?"),
    ({"messages": [SYSTEM, Q, A], "system": "Be brief.\n"}, "messages", "Be brief.\n\n2 + 3?")])
def test_parts_of_a_prompt_in_fields_of_their_own_are_spelled(row, shape, prefix):
    rows = RowFormat(default_condition="", shape=shape)
    assert examples_of(row, "x:1", rows) == [Example("", prefix, "5")]
    assert {*row} <= {*fields_to_read([*row, "id"], rows)} and "id" not in fields_to_read([*row, "id"], rows)
    ignoring = replace(rows, ignored_fields=("input", "system", "system_prompt"))
    assert examples_of(row, "x:1", ignoring)[0].instruction in (
        "Sum up.", "Sort it.", "a?", "2 + 3?", "Be brief.\n\n2 + 3?" if SYSTEM in row.get("messages", ()) else "")


@pytest.mark.parametrize("field", ["context", "documents", "history", "tools", "functions"])
@pytest.mark.parametrize("row, shape", [
    ({"instruction": "a?", "response": "5"}, "fields"), ({"instruction": "a?", "output": "5"}, "alpaca"),
    ({"messages": [Q, A]}, "messages")])
def test_parts_of_a_prompt_that_no_shape_spells_are_not_dropped_without_a_word(row, shape, field):
    rows, value = RowFormat(default_condition="", shape=shape), [["q1", "a1"]] if field == "history" else "It matters."
    with pytest.raises(BadRow, match=f"x:1: {field}=.*would be lost; write it into .*--ignore-fields {field}") as bad:
        examples_of({**row, field: value}, "x:1", rows)
    assert bad.value.kind == "lost field" and field in fields_to_read([*row, field], rows)
    assert len(examples_of({**row, field: value}, "x:1", replace(rows, ignored_fields=(field,)))) == 1
    if shape == "fields":  # whatever a flag names has the meaning that it gives
        assert len(examples_of({"q": "a?", field: "5"}, "x:1", replace(rows, keys=("condition", "q", field)))) == 1


@pytest.mark.parametrize("row, shape, message", [
    ({"q": "a?", "a": "5", "input": "b"}, "fields", "input='b' belongs to the prompt and would be lost"),
    ({"messages": [SYSTEM, Q, A], "system": "Be long."}, "messages", "'Be long.' beside the turns, 'Be brief.' as"),
    ({"instruction": "a?", "output": "5", "system": "a", "system_prompt": "b"}, "alpaca", "system and system_prompt"),
    ({"messages": [Q, A], "system": ["a"]}, "messages", r"system=\['a'\] is not a string")])
def test_a_prompt_whose_parts_have_no_clear_place_is_a_bad_row(row, shape, message):
    keys = ("condition", "q", "a") if "q" in row else RowFormat().keys
    with pytest.raises(BadRow, match=f"x:1: .*{message}"):
        examples_of(row, "x:1", RowFormat(keys, default_condition="", shape=shape))


def test_a_field_may_be_nested_as_deeply_as_json_is_read():
    row = parse_object(json.dumps({"instruction": "a?", "response": "5"})[:-1].encode() + b', "tools": ' + b"[" * 800
                       + b"]" * 800 + b"}", "x:1")
    assert len(examples_of(row, "x:1", RowFormat(default_condition=""))) == 1


def test_a_row_that_does_not_fit_is_refused_for_that_and_not_for_what_it_would_lose():
    with pytest.raises(BadRow, match="no field 'instruction'.*--json-keys"):
        examples_of({"context": "Long", "question": "q?", "answer": "a"}, "x:1", RowFormat(default_condition=""))


FIELDS_ROW = {"condition": "", "instruction": "2 + 3?", "response": "5"}
ALPACA_ROW = {"instruction": "2 + 3?", "output": "5"}


@pytest.fixture
def call(tmp_path, tool, capsys, caplog):
    def call(*flags):
        caplog.set_level(logging.INFO)
        status = tool("train_tokenizer")(["--output", str(tmp_path / "tok"), "--vocab-size", "300", "--overwrite",
                                          *map(str, flags)])
        return status, "".join(capsys.readouterr())
    return call


def test_the_first_row_tells_the_shape_and_rows_of_another_are_named(write_jsonl, tmp_path, call, caplog):
    path = write_jsonl("a.jsonl", ["{", {"messages": [Q, A]}, ALPACA_ROW, {"what": 1}])
    status, said = call("--input", path, "--default-condition", "", "--on-bad-row", "skip")
    assert status == 0 and f"row shape: messages, as in {path}:2" in caplog.text
    assert (f"skipped 1: mixed row shapes, first {path}:3: a row of shape alpaca (['instruction', 'output']) among "
            "rows of shape messages; read them in two runs") in said
    assert f"skipped 1: missing field, first {path}:4: no field 'messages' or 'conversations' (there are ['wha" in said


@pytest.mark.parametrize("flags, message", [
    (["--row-shape", "alpaca"], "a.jsonl:1: a row of shape fields (['condition', 'instruction', 'response']) among "
                                "rows of shape alpaca"),
    (["--row-shape", "alpaca", "--json-keys", "a", "b", "c"], "--json-keys names fields that --row-shape alpaca does"),
    (["--json-keys", "a", "instruction", "output"], "no field 'output'")])
def test_a_shape_that_is_named_is_held_to(write_jsonl, call, flags, message):
    path = write_jsonl("a.jsonl", [FIELDS_ROW, ALPACA_ROW])
    status, said = call("--input", path, "--default-condition", "", *flags)
    assert status == 1 and message in said and said.count("\n") == 1, said


@pytest.mark.parametrize("row, said", [
    ({"text": "a"}, "a document"), (ALPACA_ROW, "a row of shape alpaca"), ({}, "no field 'messages'")])
def test_names_of_fields_can_be_written_wherever_a_message_goes(row, said):
    row = parse_object(json.dumps({**row, "\ud800\n": 1, "z" * 3_000: 2}).encode(), "x:1")
    with pytest.raises(BadRow, match=said) as refused:
        examples_of(row, "x:1", CHAT)
    assert "\n" not in str(refused.value) and len(str(refused.value).encode()) < 300


@pytest.mark.parametrize("shape, row, way_out", [
    ("alpaca", {"instruction": "a"}, "add it"), ("messages", {"messages": [{"role": "user"}]}, "add it"),
    ("fields", {"instruction": "a"}, "add it or name yours with --json-keys")])
def test_a_flag_is_named_only_where_it_names_the_field(shape, row, way_out):
    with pytest.raises(BadRow) as refused:
        examples_of(row, "x:1", RowFormat(default_condition="", shape=shape))
    assert str(refused.value).endswith(f"; {way_out}")


def test_handled_turns_are_in_the_report(write_jsonl, tmp_path, tokenizer, tool, capsys):
    path = write_jsonl("a.jsonl", [{"messages": [Q, A, Q]}, {"messages": [Q, Q, A]}] * 3)
    assert tool("preprocess_data")(["--input", str(path), "--output-prefix", str(tmp_path / "x"), "--tokenizer-model",
                                    str(tokenizer.path), "--default-condition", "direct"]) == 0
    said = capsys.readouterr().out
    assert "6 examples, " in said and "\n6 rows have no condition and took the default, or that of a rule\n" in said
    assert "\n3 turns behind the last of the assistant, left out\n3 turns of the user behind another" in said


def test_the_documentation_shows_rows_of_every_shape_and_the_prefix_of_a_chat():
    text = (ROOT / "docs" / "data.md").read_text()
    shown = [json.loads(line) for line in text.splitlines() if line.startswith('{"')]
    assert {shape_of(row, RowFormat()) for row in shown} == set(SHAPES)
    prefixes = [example.instruction for row in shown if "messages" in row for example in examples_of(row, "x:1", CHAT)]
    assert len(prefixes) > 1 and f"```text\n{prefixes[-1]}\n```" in text
