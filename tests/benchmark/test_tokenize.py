"""The measurement of rows to ids: what is generated, and that both paths are held against each other."""
import json

import pytest

from hrm_megatron.benchmark import tokenize
from hrm_megatron.benchmark.texts import LETTERS, SHARES, write_examples
from hrm_megatron.config import ConfigError
from hrm_megatron.data.readers import pieces
from hrm_megatron.data.tokenizer import save_tokenizer, train_tokenizer


def test_texts_are_those_of_their_seed_and_share(tmp_path):
    sizes = [write_examples(tmp_path / f"{i}.jsonl", 0.3, seed) for i, seed in enumerate((1, 1, 2))]
    one, same, other = ((tmp_path / f"{i}.jsonl").read_text() for i in range(3))
    assert one == same != other and min(sizes) >= 300_000
    rows = [json.loads(line) for line in one.splitlines()]
    assert sum(len(row[key].encode()) for row in rows for key in ("instruction", "response")) == sizes[0]
    assert sum(SHARES.values()) == pytest.approx(1) and SHARES.keys() == LETTERS.keys()
    for first, last in (letters for letters in LETTERS.values() if isinstance(letters, tuple)):
        assert any(chr(first) <= c <= chr(last) for c in one), "no text of this script"


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Run the three ways over a piece here, in this process."""
    folder = tmp_path_factory.mktemp("measured")
    write_examples(folder / "rows.jsonl", 0.1, 3)
    save_tokenizer(train_tokenizer(["some words"] * 3, 300), folder / "tok")
    (piece,) = pieces(folder / "rows.jsonl")
    tokenize._start_ours(folder / "tok", "auto")
    ours = tokenize._texts_by_ours(piece), tokenize._rows_by_ours(piece)
    tokenize._start_megatron(folder / "tok")
    return *ours, tokenize._rows_by_megatron(piece), len((folder / "rows.jsonl").read_text().splitlines())


def test_both_paths_give_the_same_ids(measured):
    texts, rows, megatron, examples = measured
    assert (texts.tokens, texts.checksum) == (megatron.tokens, megatron.checksum)
    assert rows.tokens == texts.tokens + 4 * examples, "begin, tag and end of a question, end of an answer"
    assert texts.seconds > 0 and megatron.seconds > 0 and texts.texts == 2 * examples


def test_other_ids_end_the_measurement(tmp_path, monkeypatch):
    class Pool:
        def __init__(self, *_):
            pass

        def submit(self, work, piece):
            return self

        def result(self):
            return tokenize.Timed(1.0, 1, next(checksums), 0, 1, 1)

        def shutdown(self, cancel_futures):
            pass

    write_examples(tmp_path / "rows.jsonl", 0.01, 3)
    monkeypatch.setattr(tokenize, "ProcessPoolExecutor", Pool)
    checksums = iter(range(100))
    with pytest.raises(ConfigError, match="piece 0: the ids differ"):
        list(tokenize._in_turns(tmp_path / "rows.jsonl", tmp_path, 1, "auto"))


def test_the_sum_weighs_pieces_by_time():
    timed = [tokenize.Timed(1.0, 10, 0, 1, 4, 5), tokenize.Timed(3.0, 20, 0, 0, 4, 9)]
    assert tokenize._sum(timed, 8_000_000) == tokenize.Total(2.0, 30, 1 / 8, 9)
