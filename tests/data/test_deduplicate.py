"""Exact duplicates are left out of training by a list beside the dataset; by plain counting of the rows."""
import importlib.util
import json
from collections import Counter

import duckdb
import numpy as np
import pytest

from hrm_megatron.config import ConfigError
from hrm_megatron.data import deduplicate as module
from hrm_megatron.data.dataset_folder import DatasetFolder, Task
from hrm_megatron.data.deduplicate import deduplicate
from hrm_megatron.data.indexed_examples import IndexedExamples
from hrm_megatron.data.kept_examples import kept_mask
from hrm_megatron.data.mixture import Mixture, Selection
from hrm_megatron.data.report import markdown, report_on
from tests.damage import zero_in_header
from tests.stores import files_of, write_single


def row(i):
    """Of 40 questions with 3 conditions and 2 answers; a space makes another text."""
    return {"condition": ("direct", "", "cot")[i % 3], "instruction": f"question {i % 40}" + " " * (i % 11 == 0),
            "response": str(i % 2)}


@pytest.fixture
def made(tool, write_jsonl, tokenizer, tmp_path, capsys):
    written = {}

    def make(rows, *flags):
        files = [tmp_path / "in" / f"{name}.jsonl" for name in rows]
        for name, part in rows.items():
            if written.get(name) != part:
                written[name] = part
                write_jsonl(f"in/{name}.jsonl", part)
        status = tool("preprocess_data")(["--input", *map(str, files), "--output-prefix", str(tmp_path / "x"),
                                          "--tokenizer-model", str(tokenizer.path), *flags])
        return status, capsys.readouterr()
    return make


ROWS = {name: [row(i) for i in range(first, first + 150)] for name, first in (("a", 0), ("b", 100))}


def test_the_first_of_equal_rows_is_kept_and_nothing_else_changes(made, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "BLOCK_EXAMPLES", 64)
    assert made(ROWS)[0] == 0
    before = files_of(tmp_path / "x")
    status, said = made(ROWS, "--deduplicate", "--workers", "2")
    assert status == 0 and files_of(tmp_path / "x") == before
    seen, first = set(), []
    for i, texts in enumerate(tuple(one.values()) for part in ROWS.values() for one in part):
        first += [i] if texts not in seen else []
        seen.add(texts)
    assert 100 < len(first) < 290
    store = IndexedExamples(tmp_path / "x")
    keys = store.example_keys()  # of two shards
    assert all(np.array_equal(store.example_keys(start, stop), keys[start:stop])
               for start, stop in ((0, 1), (149, 151), (150, 300), (0, 300), (151, 299)))
    assert np.flatnonzero(kept_mask(store)).tolist() == first
    assert f"{300 - len(first)} of 300 examples are duplicates" in said.out
    line = f"\n{len(first)} of these examples are trained on, the others are duplicates of some (x.kept.json)"
    assert line in markdown(report_on(store))
    facts = json.loads((tmp_path / "x.kept.json").read_text())
    assert (facts["examples"], facts["duplicates"]) == (300, 300 - len(first))
    loaded = Mixture([store], 64, Selection(seed=1)).epoch(0)
    assert Counter(loaded.window(0, len(loaded)).ids.tolist()) == Counter(first)
    assert not list(tmp_path.glob("*deduplicate*")) and not list(tmp_path.glob("*partial*"))


def test_the_list_of_a_dataset_that_has_changed_is_not_used(made, tmp_path):
    assert made(ROWS, "--deduplicate")[0] == 0
    lists = [tmp_path / "x.kept.npy", tmp_path / "x.kept.json"]
    before = [path.read_bytes() for path in lists]
    assert made(ROWS)[0] == 0 and [path.read_bytes() for path in lists] == before
    changed = {**ROWS, "b": ROWS["b"][:-1]}
    status, said = made(changed)
    assert status == 0 and "x: has changed, and its duplicates are not left out any more" in said.out
    assert not any(path.exists() for path in lists)
    for path, content in zip(lists, before, strict=True):
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="x.kept.json: made for another dataset; deduplicate again"):
        kept_mask(IndexedExamples(tmp_path / "x"))
    assert made(changed, "--deduplicate")[0] == 0
    assert len(kept_mask(IndexedExamples(tmp_path / "x"))) == 299


@pytest.mark.parametrize("content", ["", "{}", "[", "[]", "7", b"\xff"])
def test_a_damaged_list_is_one_line_until_it_is_made_again(made, tmp_path, content):
    assert made(ROWS, "--deduplicate")[0] == 0
    described = tmp_path / "x.kept.json"
    before = described.read_bytes()
    described.write_bytes(content if isinstance(content, bytes) else content.encode())
    status, said = made(ROWS)
    assert status == 1 and said.err.startswith(f"error: {described}: ") and said.err.count("\n") == 1
    assert said.err.endswith("; deduplicate again, or delete it to train on all examples\n")
    with pytest.raises(ConfigError, match="x.kept.json: .*deduplicate again"):
        kept_mask(IndexedExamples(tmp_path / "x"))
    assert made(ROWS, "--deduplicate")[0] == 0 and described.read_bytes() == before


def test_damaged_bits_of_a_list_are_one_line(made, tmp_path):
    assert made(ROWS, "--deduplicate")[0] == 0
    zero_in_header(tmp_path / "x.kept.npy")
    with pytest.raises(ConfigError, match="x.kept.json: .*x.kept.npy: cannot read .*; deduplicate again"):
        kept_mask(IndexedExamples(tmp_path / "x"))


def test_what_does_not_fit_in_memory_is_cleared_away_with_all_else_of_a_run(made, tmp_path, monkeypatch):
    assert made(ROWS)[0] == 0
    dead = tmp_path / "x.shards" / "partial-0-of-1" / "deduplicate"
    dead.mkdir(parents=True)
    (dead / "keys").write_bytes(b"of a run that was killed")
    with DatasetFolder(tmp_path / "x", Task(1, 2)).held(), pytest.raises(ConfigError, match="in use by another run"):
        deduplicate(IndexedExamples(tmp_path / "x"))
    connected, connect = [], duckdb.connect
    monkeypatch.setattr(duckdb, "connect", lambda path, **options: connected.append(path) or connect(path, **options))
    deduplicate(IndexedExamples(tmp_path / "x"))
    assert connected == [dead / "keys"] and not dead.parent.exists()
    monkeypatch.setattr(module, "LATER_ONES", "SELECT nothing FROM nowhere")
    with pytest.raises(ConfigError, match=f"{dead}: cannot deduplicate .*nowhere.*; free some space"):
        deduplicate(IndexedExamples(tmp_path / "x"))
    assert not dead.parent.exists()


def test_what_cannot_be_deduplicated_is_refused(made, tmp_path, monkeypatch):
    write_single(tmp_path / "old", [([6, 50, 7], [60, 11])] * 3)
    with pytest.raises(ConfigError, match="old: written by an older version, without the keys"):
        deduplicate(IndexedExamples(tmp_path / "old"))
    status, said = made(ROWS, "--deduplicate", "--shard", "0/2")
    assert status == 1 and "--deduplicate is incompatible with --shard (give it with --merge)" in said.err
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "duckdb" else find(name))
    status, said = made(ROWS, "--deduplicate")
    assert status == 1 and "--deduplicate needs duckdb, which is not installed" in said.err
    assert not list(tmp_path.glob("x*"))
