"""The demo's questions: files that share nothing, the same bytes for the same seed, and the baseline to beat."""
from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("mathematics_dataset")
from examples.demo.questions import MODULES, _distinct_rows, constant_answer_accuracy, write_questions
from hrm_megatron.config import ConfigError

COUNTS = {"train": 1300, "valid": 31, "test": 47}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("questions")
    write_questions(folder, *COUNTS.values(), seed=5)
    return folder


def read(folder: Path, name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_rows_are_what_preprocessing_reads(folder):
    for name, count in COUNTS.items():
        rows = read(folder, name)
        assert len(rows) == count
        assert {row["module"] for row in rows} == set(MODULES)
        assert all(list(row) == ["condition", "instruction", "response", "module"] for row in rows)
        assert all(row["condition"] == "direct" and row["instruction"] and row["response"] for row in rows)


def test_modules_share_a_file_evenly(folder):
    counts = [sum(row["module"] == module for row in read(folder, "train")) for module in MODULES]
    assert max(counts) - min(counts) <= 1


def test_no_question_occurs_twice(folder):
    texts = [row["instruction"] for name in COUNTS for row in read(folder, name)]
    assert len(texts) == len(set(texts)) == sum(COUNTS.values())


def test_answers_are_right(folder):
    digits = [row for row in read(folder, "test") if row["instruction"].startswith("What is the units digit of ")]
    assert digits
    assert all(row["instruction"][-2] == row["response"] for row in digits)


def test_a_seed_decides_the_bytes_whatever_the_number_of_processes(folder, tmp_path):
    returned = write_questions(tmp_path / "again", *COUNTS.values(), seed=5, processes=1)
    for name in COUNTS:
        assert (tmp_path / "again" / f"{name}.jsonl").read_bytes() == (folder / f"{name}.jsonl").read_bytes()
        assert returned[name] == read(folder, name)
    other = write_questions(tmp_path / "other", 40, 0, 0, seed=6)
    assert other["train"] != returned["train"][:40]
    assert not read(tmp_path / "other", "test")


def test_impossible_wishes_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"numbers__nothing.*choose from .*numbers__place_value"):
        write_questions(tmp_path, 1, 1, 1, modules=("numbers__nothing",))


def test_the_best_constant_answer_is_per_module():
    def rows(module: str, *answers: str) -> list[dict[str, str]]:
        return [{"condition": "direct", "instruction": "", "response": answer, "module": module} for answer in answers]

    train = rows("a", "1", "1", "2") + rows("b", "True", "False", "False")
    test = rows("a", "1", "2") + rows("b", "False", "1", "True") + rows("unseen", "1")
    assert constant_answer_accuracy(train, test) == 2 / 6


def test_a_module_with_too_few_questions_is_refused():
    class TinyModule:
        def starmap(self, *_, **__):
            return [[("1 + 1?", "2"), ("1 + 2?", "3")]]

    assert len(_distinct_rows(TinyModule(), "tiny", 2, seed=0)) == 2
    with pytest.raises(ConfigError, match="tiny: 3 different questions wanted, there are about 2"):
        _distinct_rows(TinyModule(), "tiny", 3, seed=0)
