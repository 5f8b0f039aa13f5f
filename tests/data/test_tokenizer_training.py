import pytest

from hrm_megatron.config import ConfigError
from hrm_megatron.data import tokenizer_training
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
