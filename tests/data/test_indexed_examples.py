import json
import shutil

import numpy as np
import pytest

from hrm_megatron.config import ConfigError
from hrm_megatron.data.indexed_examples import IndexedExamples, IndexedExamplesWriter, _indexed_dataset

EXAMPLES = [([6, 9, 40, 7], [50, 51, 11]), ([6, 7], [11]), ([6, 41, 42, 7], [52, 11]), ([6, 43, 7], [53, 54, 55, 11])]


class FakeTokenizer:
    fingerprint, boq, eoq, eoa = "f" * 64, 6, 7, 11

    def __init__(self, vocab_size=300):
        self.vocab_size = vocab_size


def write(prefix, examples=EXAMPLES, tokenizer=None, overwrite=False):
    with IndexedExamplesWriter(prefix, tokenizer or FakeTokenizer(), overwrite) as writer:
        for prefix_ids, target_ids in examples:
            writer.add(np.array(prefix_ids), np.array(target_ids))


@pytest.fixture
def prefix(tmp_path):
    write(tmp_path / "v1.2 data")
    return tmp_path / "v1.2 data"


def test_round_trip(prefix):
    store = IndexedExamples(prefix)
    assert len(store) == 4
    assert [tuple(part.tolist() for part in store[i]) for i in range(4)] == EXAMPLES
    prefix_lengths, target_lengths = store.lengths()
    assert (prefix_lengths.tolist(), target_lengths.tolist()) == ([4, 2, 4, 3], [3, 1, 2, 4])


def test_ids_and_lengths_outlive_the_store(prefix):
    (prefix_ids, target_ids), (prefix_lengths, _) = IndexedExamples(prefix)[0], IndexedExamples(prefix).lengths()
    assert (prefix_ids.tolist(), target_ids.tolist(), prefix_lengths.tolist()) == (*EXAMPLES[0], [4, 2, 4, 3])


def test_stock_megatron_reads_documents_of_two_sequences(prefix):
    dataset = _indexed_dataset().IndexedDataset(str(prefix))
    assert dataset.document_indices.tolist() == [0, 2, 4, 6, 8]
    assert [dataset[i].tolist() for i in range(8)] == [ids for example in EXAMPLES for ids in example]


def test_metadata(prefix):
    assert json.loads((prefix.parent / "v1.2 data.json").read_text()) == {
        "tokenizer_fingerprint": "f" * 64, "vocab_size": 300, "boq": 6, "eoq": 7, "eoa": 11, "examples": 4,
        "tokens": 23, "max_row_length": 6}


@pytest.mark.parametrize("vocab_size, item_bytes", [(65_536, 2), (65_537, 4)])
def test_tokens_take_two_bytes_where_they_fit(tmp_path, vocab_size, item_bytes):
    last = vocab_size - 1
    write(tmp_path / "x", [([6, last, 7], [last, 11])], FakeTokenizer(vocab_size))
    assert (tmp_path / "x.bin").stat().st_size == 5 * item_bytes
    assert IndexedExamples(tmp_path / "x")[0][0].tolist() == [6, last, 7]


def snapshot(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_existing_store_is_kept_unless_told(prefix):
    before = snapshot(prefix.parent)
    with pytest.raises(ConfigError, match="v1.2 data.bin, .*--overwrite or choose another --output-prefix"):
        write(prefix, EXAMPLES[:1])
    assert snapshot(prefix.parent) == before
    write(prefix, EXAMPLES[:1], overwrite=True)
    assert len(IndexedExamples(prefix)) == 1 and len(snapshot(prefix.parent)) == 3


def test_an_interrupted_write_leaves_nothing(prefix):
    before = snapshot(prefix.parent)
    new = prefix.parent / "not yet" / "there" / "x"
    for target, overwrite in ((prefix, True), (new, False)):
        with pytest.raises(KeyboardInterrupt), IndexedExamplesWriter(target, FakeTokenizer(), overwrite) as writer:
            writer.add(np.array([6, 7]), np.array([11]))
            raise KeyboardInterrupt
    assert snapshot(prefix.parent) == before


def test_an_empty_store_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no example to write"):
        write(tmp_path / "x", [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", ["bin", "idx"])
def test_every_truncation_is_seen(prefix, part):
    path = prefix.parent / f"{prefix.name}.{part}"
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ConfigError, match=rf"{path}: truncated: {size} bytes.*run python tools/preprocess_data.py"):
            IndexedExamples(prefix)
    path.write_bytes(whole + b"\0\0")
    with pytest.raises(ConfigError, match=f"{part}: truncated"):
        IndexedExamples(prefix)
    path.write_bytes(whole)
    assert len(IndexedExamples(prefix)) == 4


@pytest.mark.parametrize("part, change, message", [
    ("idx", lambda data: b"X" + data[1:], "not a Megatron index"),
    ("idx", lambda data: data[:17] + b"\x07" + data[18:], "not a Megatron index"),
    ("json", lambda data: data[:-3], "not JSON"),
    ("json", lambda data: b"[]", "has no tokenizer_fingerprint"),
    ("json", lambda data: data.replace(b'"eoa"', b'"end"'), "has no eoa"),
    ("json", lambda data: data.replace(b'"examples": 4', b'"examples": 5'), "speaks of 5 examples, the index of 4"),
])
def test_damaged_files_are_refused(prefix, part, change, message):
    path = prefix.parent / f"{prefix.name}.{part}"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ConfigError, match=message) as refusal:
        IndexedExamples(prefix)
    assert str(path) in str(refusal.value) and "python tools/preprocess_data.py" in str(refusal.value)


@pytest.mark.parametrize("missing", [("bin",), ("idx",), ("json",), ("bin", "json")])
def test_missing_files_are_named(prefix, missing):
    for part in missing:
        (prefix.parent / f"{prefix.name}.{part}").unlink()
    with pytest.raises(ConfigError) as refusal:
        IndexedExamples(prefix)
    named = [part for part in ("bin", "idx", "json") if f"{prefix}.{part}" in str(refusal.value)]
    assert named == list(missing) and "tools/preprocess_data.py" in str(refusal.value)


def test_documents_that_are_no_pairs_are_refused(prefix, tmp_path):
    builder = _indexed_dataset().IndexedDatasetBuilder(str(tmp_path / "plain.bin"), dtype=np.uint16)
    builder.add_document(np.arange(7), [7])
    builder.add_document(np.arange(3), [3])
    builder.finalize(str(tmp_path / "plain.idx"))
    shutil.copy(f"{prefix}.json", tmp_path / "plain.json")
    with pytest.raises(ConfigError, match="plain.idx: its documents are not pairs"):
        IndexedExamples(tmp_path / "plain")


@pytest.mark.parametrize("ids, message", [
    ([([6, 9, 7], [50, 11]), ([6, 41, 42, 7], [52, 300, 11])], "example 1: token 1 of its target has the id 300"),
    ([([6, 511, 7], [50, 11]), ([6, 7], [11])], "example 0: token 1 of its prefix has the id 511"),
    ([([6, 7], [11]), ([6, 7], [11]), ([6, 7], [65535])], "example 2: token 0 of its target has the id 65535"),
])
def test_an_id_outside_the_vocabulary_is_refused_when_opened(tmp_path, ids, message):
    write(tmp_path / "x", ids)
    with pytest.raises(ConfigError, match=f"{tmp_path}/x, {message}, but the vocabulary has 300 entries; write"):
        IndexedExamples(tmp_path / "x")


def test_a_negative_id_is_refused_too(tmp_path):
    write(tmp_path / "x", [([6, 7], [11]), ([6, -1, 7], [11])], FakeTokenizer(70_000))
    with pytest.raises(ConfigError, match="example 1: token 1 of its prefix has the id -1"):
        IndexedExamples(tmp_path / "x")


def test_a_store_too_large_to_scan_is_opened(tmp_path, monkeypatch):
    write(tmp_path / "x", [([6, 300, 7], [11])])
    monkeypatch.setattr("hrm_megatron.data.indexed_examples.SCANNED_BYTES", (tmp_path / "x.bin").stat().st_size - 1)
    assert IndexedExamples(tmp_path / "x")[0][0].tolist() == [6, 300, 7]


def test_another_tokenizer_is_refused(prefix):
    store = IndexedExamples(prefix)
    store.check_tokenizer("f" * 64)
    with pytest.raises(ConfigError, match="written with tokenizer ffffffffffff, not with 0000000000"):
        store.check_tokenizer("0" * 64)
