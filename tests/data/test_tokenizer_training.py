import json
import logging

import pytest

from hrm_megatron.config import ConfigError
from hrm_megatron.data import progress, tokenizer_training
from hrm_megatron.data.tokenizer_training import TEXTS_PER_CAPPED_ROW, learn_tokenizer


def test_a_capped_file_gives_ten_texts_for_each_row(write_jsonl, tmp_path, monkeypatch):
    rows = [dict(condition="", instruction=f"question {i}", response=f"answer {i}") for i in range(30)]
    paths = [write_jsonl("a.jsonl", rows), write_jsonl("b.jsonl", rows[:4])]
    taken = []
    train = tokenizer_training.train_tokenizer
    monkeypatch.setattr(tokenizer_training, "train_tokenizer",
                        lambda texts, size: taken.extend(texts) or train(taken, size))
    learn_tokenizer(paths, tmp_path / "tok", 300, max_per_file=2)
    texts = [text for row in rows for text in (row["instruction"], row["response"])]
    assert TEXTS_PER_CAPPED_ROW == 10 and taken == texts[:20] + texts[:8]
    with pytest.raises(ConfigError, match="made with max_per_file=2, not 3"):
        learn_tokenizer(paths, tmp_path / "tok", 300, max_per_file=3, keep_same=True)
    with pytest.raises(ConfigError, match="--max-per-file 0"):
        learn_tokenizer(paths, tmp_path / "none", 300, max_per_file=0)


def test_every_file_tells_its_own_shape(write_jsonl, tmp_path, tool, capsys, caplog):
    """Also a file that has no row, and none of the files is read as the others are."""
    rows = {"alpaca": dict(instruction="a q", input="b", output="c"), "fields": dict(instruction="d", response="e"),
            "messages": dict(messages=[dict(role="user", content="f"), dict(role="assistant", content="g")])}
    paths = [write_jsonl("in/0.jsonl", [""]), *(write_jsonl(f"in/{name}.jsonl", [row]) for name, row in rows.items())]
    arguments = ["--input", str(tmp_path / "in"), "--output", str(tmp_path / "tok"), "--vocab-size", "300",
                 "--default-condition", ""]
    assert tool("train_tokenizer")(arguments) == 0
    assert [line for line in caplog.messages if "shape" in line] == [
        f"row shape: {name}, as in {path}:1" for name, path in zip(rows, paths[1:], strict=True)]
    made_from = json.loads((tmp_path / "tok" / "made_from.json").read_text())
    assert made_from["settings"]["row_shape"] == "alpaca, fields, messages"
    capsys.readouterr()
    assert tool("train_tokenizer")([*arguments, "--keep-same"]) == 0 and "kept" in capsys.readouterr().out
    write_jsonl("in/messages.jsonl", [{"note": "header"}, rows["messages"]])
    assert tool("train_tokenizer")([*arguments, "--overwrite", "--on-bad-row", "skip"]) == 0
    assert "skipped 1: " in (said := capsys.readouterr().out) and said.count("skipped") == 1
    assert f"row shape: messages, as in {tmp_path}/in/messages.jsonl:2" in caplog.messages
    write_jsonl("in/fields.jsonl", [dict(q="d", a="e")])  # of which flags tell one of several shapes
    named = [*arguments, "--overwrite", "--on-bad-row", "skip", "--json-keys", "condition", "q", "a"]
    assert tool("train_tokenizer")(named) == 0 and "skipped 1: " in capsys.readouterr().out
    write_jsonl("in/fields.jsonl", [rows["fields"], rows["alpaca"]])
    assert tool("train_tokenizer")([*arguments, "--overwrite"]) == 1
    assert "fields.jsonl:2: a row of shape alpaca" in capsys.readouterr().err


def test_a_tool_that_trains_nothing_says_nothing_of_epochs(caplog):
    progress.show_log()
    logging.getLogger("hrm_megatron.data.plan").info("data: planning the rows of 40400 examples, epoch 0")
    logging.getLogger("hrm_megatron.data.inputs").info("row shape: fields")
    assert caplog.messages == ["row shape: fields"]


def test_without_a_terminal_a_line_a_minute_says_how_far_it_is(monkeypatch, caplog):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    caplog.set_level(logging.INFO)
    with progress.Progress() as bar:
        now[0] += 500
        bar.begin(3_000_000)
        for _ in range(5):
            now[0] += 25
            bar.made(600_000, 7_500)
    first, = caplog.messages
    assert "60%" in first and "1.80M/3.00M [01:15<00:50, " in first and first.endswith("300 tokens/s]")
    caplog.clear()
    with progress.Bar(" examples") as bar:
        for _ in range(61):
            now[0] += 1
            bar.advance()
    assert caplog.messages == ["60 examples [01:00,  1.00 examples/s]"]
