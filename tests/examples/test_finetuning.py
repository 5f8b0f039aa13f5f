"""The parts of examples/finetuning: its chats, its folder, its promise, and ways that share one exact step."""
from __future__ import annotations

import re
import shlex

import pytest

from examples.finetuning.chats import questions_of, write_chats
from examples.finetuning.run import MARKER, STORES, Failed, judge, main, prepare
from hrm_megatron.config import ConfigError
from tests.random_checkpoint import write_random_checkpoint
from tests.stores import write_store

COUNTS = {"train": 300, "held_out": 40, "test": 50}


def numbers(chats):
    return {number for chat in chats for turn in chat["messages"] if turn["role"] == "user"
            for number in re.findall(r"\d+", turn["content"])}


def test_no_number_of_training_is_in_another_chat(tmp_path):
    files = write_chats(tmp_path / "a", COUNTS)
    assert {name: len(chats) for name, chats in files.items()} == COUNTS
    assert not numbers(files["train"]) & (numbers(files["held_out"]) | numbers(files["test"]))
    assert write_chats(tmp_path / "b", COUNTS) == files
    assert all((tmp_path / "a" / f"{name}.jsonl").read_bytes() == (tmp_path / "b" / f"{name}.jsonl").read_bytes()
               for name in COUNTS)


def test_every_answer_is_its_number_backwards(tmp_path):
    chats = write_chats(tmp_path, COUNTS)["test"]
    rows = questions_of(chats)
    assert len(rows) == sum(len(chat["messages"]) // 2 for chat in chats) > len(chats)
    assert all(row["response"] == re.findall(r"\d+", row["instruction"])[-1][::-1] for row in rows)


def test_the_promise():
    judge([0.0, 0.7], [0.95, 0.66])
    for after in ([0.89, 0.7], [0.99, 0.64]):
        with pytest.raises(Failed, match="promised are 90%, and a fall of at most 5 points"):
            judge([0.0, 0.7], after)


def test_nothing_of_others_is_replaced(tmp_path):
    demo, folder = tmp_path / "demo", tmp_path / "out"
    with pytest.raises(ConfigError, match="no checkpoints in it; run `make demo`"):
        prepare(demo, folder)
    for name in ("checkpoints", "tokenizer", "questions"):
        (demo / name).mkdir(parents=True)
    for name in ("train", "test"):
        (demo / "questions" / f"{name}.jsonl").touch()
    (folder / "stores").mkdir(parents=True)
    with pytest.raises(ConfigError, match="is not of this example"):
        prepare(demo, folder)
    (folder / MARKER).touch()
    (folder / "mine").touch()
    prepare(demo, folder)
    assert {path.name for path in folder.iterdir()} == {MARKER, "mine"}


def test_an_impossible_number_of_old_questions_loses_nothing(tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MARKER).touch()
    (tmp_path / "out" / "stores").mkdir()
    assert main(["--output", str(tmp_path / "out"), "--old-questions", "-1"]) == 1
    assert "error: --old-questions -1: must be at least 0" in capsys.readouterr().err
    assert (tmp_path / "out" / "stores").is_dir()


def test_a_rate_by_ticks_only_divides(single_rank):
    from examples.finetuning.compare import Way, groups
    from tests.model.small import build

    model = build()
    shares = {name: group["share"] for (name, _), group in zip(
        model.named_parameters(), groups(model, Way("", (), by_ticks=True)), strict=True)}
    # With 5 gradient ticks: 2 of H and 3 of L.
    assert {name.split(".")[0]: share for name, share in shares.items()} == {
        "embedding": 1, "h_stack": 1 / 2, "l_stack": 1 / 3, "output_layer": 1}
    assert {group["share"] for group in groups(model, Way("", ()))} == {1}


@pytest.fixture
def compare_command(single_rank, tmp_path):
    """The command that compare.py's docstring shows, on a small model and stores named as those of the example."""
    from examples.finetuning import compare

    runs = tmp_path / "runs"
    write_random_checkpoint(runs / "demo" / "checkpoints", seq_length=compare.ROW_TOKENS)
    for prefix in (*(runs / "finetuning" / "stores" / name for name in STORES), runs / "demo" / "stores" / "valid"):
        prefix.parent.mkdir(parents=True, exist_ok=True)
        write_store(prefix, [([6, 20 + i, 7], [30 + i, 11]) for i in range(4)])
    [shown] = re.findall(r"python examples/finetuning/compare\.py (.*?)\n\n?$", compare.__doc__, re.S)
    return [word.replace("runs/", f"{runs}/") for word in shlex.split(shown.replace("\\\n", " "))]


def test_the_comparison_runs_by_the_command_that_it_shows(compare_command, capsys):
    from examples.finetuning.compare import WAYS, main

    assert main([*compare_command, "--updates", "1", "--seeds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| ") for line in lines) == 1 + sum(len(way.rates) for way in WAYS)


@pytest.mark.parametrize(("flags", "message"), [
    (["--seeds", "0"], "--seeds 0: must be at least 1"), (["--updates", "-1"], "--updates -1: must be at least 1"),
    (["--load", "nope"], "nope"), (["--new", "nope"], "nope.json missing; write the dataset with")])
def test_a_comparison_that_cannot_be_is_refused_in_one_line(compare_command, capsys, flags, message):
    from examples.finetuning.compare import main

    assert main([*compare_command, *flags]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
