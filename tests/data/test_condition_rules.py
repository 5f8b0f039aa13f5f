"""Tags by rule: of rows without a condition of their own, told from their texts."""
from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from hrm_megatron.config import ConfigError
from hrm_megatron.data.condition_rules import ConditionRule, read_condition_rules
from hrm_megatron.data.dataset_folder import DatasetFolder, Task
from hrm_megatron.data.example import BadRow, RowFormat
from hrm_megatron.data.indexed_examples import IndexedExamples
from hrm_megatron.data.row_shapes import examples_of
from tests.stores import files_of

TAGS = ("direct", "cot", "noisy", "synth")
RULES = [{"condition": "synth,cot", "instruction": "(?i)step by step", "response": "(?s)<think>.*</think>"},
         {"condition": "cot", "response": "(?s).{20}"}]
LONG = "one and one\nare two, and so on"


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "rules.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path
    return write


def conditions(rules, rows, **settings):
    rows_format = RowFormat(condition_rules=rules, **settings)
    return [example.condition for row in rows for example in examples_of(row, "x:1", rows_format)]


def test_the_first_rule_that_fits_holds_and_a_condition_of_its_own_wins(write):
    rules = read_condition_rules(write(RULES), TAGS)
    rows = [{"instruction": "Think Step By Step.", "response": "<think>\n2</think> 2"},
            {"instruction": "Think step by step.", "response": "2"}, {"instruction": "1 + 1?", "response": LONG},
            {"condition": "noisy", "instruction": "1 + 1?", "response": LONG},
            {"condition": "", "instruction": "1 + 1?", "response": LONG},
            {"condition": None, "instruction": "1 + 1?", "response": LONG}]
    assert conditions(rules, rows, default_condition="direct") == ["synth,cot", "direct", "cot", "noisy", "", "cot"]
    with pytest.raises(BadRow, match="no field 'condition'"):
        conditions(rules, rows[1:2])
    assert conditions((*rules, ConditionRule("")), rows[1:2]) == [""]


def test_every_answer_of_a_chat_is_held_against_the_rules_by_itself(write, write_jsonl, tmp_path, tokenizer, tool):
    turns = [("user", "1 + 1?"), ("assistant", "2"), ("user", "why?"), ("assistant", LONG)]
    path = write_jsonl("a.jsonl", [{"messages": [{"role": role, "content": text} for role, text in turns]}])
    arguments = ["--input", str(path), "--output-prefix", str(tmp_path / "s"), "--tokenizer-model", str(tokenizer.path),
                 "--default-condition", "direct"]
    assert tool("preprocess_data")([*arguments, "--condition-rules", str(write(RULES))]) == 0
    store = IndexedExamples(tmp_path / "s")
    prefixes = [("direct", "1 + 1?"), ("cot", "User: 1 + 1?\n\nAssistant: 2\n\nUser: why?")]
    assert [store[i][0].tolist() for i in range(len(store))] == [tokenizer.encode_prefix(*one) for one in prefixes]
    assert tool("preprocess_data")(arguments) == 1  # other rules are other data


def test_the_same_command_again_and_tasks_find_what_was_made_by_the_same_rules(write, write_jsonl, tmp_path, tokenizer,
                                                                               tool, capsys):
    inputs = [write_jsonl(f"in/{name}.jsonl", [{"instruction": f"{name}?", "response": LONG}]) for name in "ab"]
    flags = ["--input", *map(str, inputs), "--tokenizer-model", str(tokenizer.path), "--condition-rules",
             str(write(RULES))]
    one, array = (["--output-prefix", str(tmp_path / name / "x")] for name in ("one", "array"))
    assert [tool("preprocess_data")([*flags, *one]) for _ in range(2)] == [0, 0]
    assert "sources: 2 kept" in capsys.readouterr().out
    assert [tool("preprocess_data")([*flags, *array, "--shard", f"{i}/2"]) for i in range(2)] == [0, 0]
    assert files_of(tmp_path / "array" / "x") == files_of(tmp_path / "one" / "x")
    (tmp_path / "array" / "x.json").unlink()
    assert [tool("preprocess_data")([*flags, *array, *more]) for more in (["--shard", "0/2"], ["--merge"])] == [0, 1]
    assert "1 of 2 sources have no shard" in capsys.readouterr().err
    with DatasetFolder(tmp_path / "array" / "x", Task(5, 9)).held():  # so that the last does not complete it
        assert tool("preprocess_data")([*flags, *array, "--shard", "1/2"]) == 0
    assert tool("preprocess_data")([*flags, *array, "--merge"]) == 0
    assert files_of(tmp_path / "array" / "x") == files_of(tmp_path / "one" / "x")


@pytest.mark.parametrize("content, said", [
    ("a: [", "rules.yaml: not YAML"), ({"condition": "cot"}, "holds dict, not a list of rules"),
    ([{"response": "a"}], "rule 1: {'response': 'a'} has no condition"),
    ([{"condition": "cot", "respons": "a"}],
     "rule 1: unknown key 'respons'; there are condition, instruction, response"),
    ([{"condition": "cot", "response": 7}], "rule 1: response 7 is no text"),
    ([{"condition": "loud"}], "rule 1: unknown tag 'loud'"),
    ([{"condition": "cot", "response": "("}], "rule 1: missing ), unterminated subpattern"),
    ([{"condition": "cot"}, {"condition": "direct"}], "rule 1 fits every row, so that those behind it have no effect"),
], ids=str)
def test_bad_rules_are_one_line(write, content, said):
    with pytest.raises(ConfigError) as refused:
        read_condition_rules(write(content), TAGS)
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_rules_are_settings_of_the_data_only_where_there_are_some():
    assert "condition_rules" not in RowFormat().settings()
    one, other = (RowFormat(condition_rules=(ConditionRule("cot", response=text),)).settings() for text in "ab")
    assert one != other


def test_the_documentation_shows_rules_that_are_read(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    path = tmp_path / "rules.yaml"
    path.write_text(re.search(r"```yaml\n(- condition.*?)```", text, re.DOTALL)[1])
    assert [rule.condition for rule in read_condition_rules(path, TAGS)] == ["synth,cot", "cot", "direct"]
