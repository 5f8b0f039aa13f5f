import json
import os
import pickle
import resource
import shutil
from dataclasses import replace
from functools import lru_cache
from itertools import count, islice

import numpy as np
import pytest

from hrm_megatron.config import ConfigError
from hrm_megatron.data import indexed_examples, open_shard, shards
from hrm_megatron.data.indexed_examples import IndexedExamples, IndexedExamplesWriter, SourceRange
from hrm_megatron.data.manifest import Manifest, Source, write_manifest
from tests.stores import FakeTokenizer, examples_of, files_of, megatron, part_of, write_single, write_store

EXAMPLES = [([6, 9, 40, 7], [50, 51, 11]), ([6, 7], [11]), ([6, 41, 42, 7], [52, 11]), ([6, 43, 7], [53, 54, 55, 11])]


@pytest.fixture
def prefix(tmp_path):
    write_store(tmp_path / "v1.2 data", EXAMPLES)
    return tmp_path / "v1.2 data"


@pytest.fixture
def single(tmp_path):
    (tmp_path / "old").mkdir()
    write_single(tmp_path / "old" / "x", EXAMPLES)
    return tmp_path / "old" / "x"


@pytest.fixture
def many(tmp_path):
    """Three sources, of which the first and the last have the same examples, and one that gave none."""
    for name, examples in (("a", EXAMPLES[:3]), ("b", EXAMPLES[3:])):
        write_store(tmp_path / name, examples)
    source = {name: IndexedExamples(tmp_path / name).manifest.sources[0] for name in "ab"}
    prefix = tmp_path / "many"
    shutil.copytree(tmp_path / "a.shards", f"{prefix}.shards")
    shutil.copytree(tmp_path / "b.shards", f"{prefix}.shards", dirs_exist_ok=True)
    sources = (source["a"], Source("empty", 0, 0, "", None), source["b"], Source("again", 0, 0, "", source["a"].shard))
    write_manifest(prefix, Manifest(IndexedExamples(tmp_path / "a").manifest.tokenizer, {}, sources), tmp_path)
    return prefix


@pytest.mark.parametrize("form", ["prefix", "single"])
def test_round_trip(form, request):
    store = IndexedExamples(request.getfixturevalue(form))
    assert len(store) == 4
    assert [tuple(part.tolist() for part in store[i]) for i in range(4)] == EXAMPLES
    prefix_lengths, target_lengths = store.lengths()
    assert (prefix_lengths.tolist(), target_lengths.tolist()) == ([4, 2, 4, 3], [3, 1, 2, 4])
    with pytest.raises(IndexError, match="example 4 of 4"):
        store[4]


def test_many_shards_are_one_sequence(many):
    store = IndexedExamples(many)
    assert examples_of(many) == [*EXAMPLES, *EXAMPLES[:3]]
    assert store.sources == (SourceRange("a", 0, 3), SourceRange("b", 3, 1), SourceRange("again", 4, 3))
    assert [lengths.tolist() for lengths in store.lengths()] == [[4, 2, 4, 3, 4, 2, 4], [3, 1, 2, 4, 3, 1, 2]]
    prompts, examples = store.prompt_keys(), store.example_keys()
    assert prompts.shape == (7,) and examples.shape == (7, 2)
    assert len(set(prompts[:4].tolist())) == len({*map(tuple, examples[:4].tolist())}) == 4
    assert np.array_equal(prompts[4:], prompts[:3]) and np.array_equal(examples[4:], examples[:3])
    assert store.metadata["examples"] == 7 and store.metadata["tokens"] == 23 + 16


def test_more_shards_than_may_be_open(many, monkeypatch):
    one_open = lru_cache(1)(indexed_examples._opened.__wrapped__)
    monkeypatch.setattr(indexed_examples, "_opened", one_open)
    blend = IndexedExamples(many), IndexedExamples(many)
    for read, i in enumerate((0, 6, 3, 0, 3, 5)):
        assert tuple(part.tolist() for part in blend[read % 2][i]) == [*EXAMPLES, *EXAMPLES[:3]][i]
        assert one_open.cache_info().currsize == 1


@pytest.fixture
def few_files():
    """Let this process open 16 more files and no more."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = {int(number) for number in os.listdir("/proc/self/fd")}
    limit = list(islice((number for number in count() if number not in taken), 17))[-1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_lengths_and_keys_of_more_shards_than_files_may_be_open(many, few_files):
    manifest = IndexedExamples(many).manifest
    sources = [replace(source, name=f"{source.name}{i}") for i in range(20) for source in manifest.sources]
    write_manifest(many, replace(manifest, sources=tuple(sources)), many.parent)
    store = IndexedExamples(many)
    assert [lengths.tolist() for lengths in store.lengths(1, 139)] == [
        ([4, 2, 4, 3, 4, 2, 4] * 20)[1:139], ([3, 1, 2, 4, 3, 1, 2] * 20)[1:139]]
    assert len({*store.prompt_keys().tolist()}) == 4
    assert store.example_keys(2, 138).shape == (136, 2)


def test_a_store_travels_to_another_process_without_its_files(prefix):
    store = IndexedExamples(prefix)
    store[0]
    sent = pickle.dumps(store)
    assert b"numpy" not in sent  # no array
    assert tuple(part.tolist() for part in pickle.loads(sent)[3]) == EXAMPLES[3]


def test_one_shard_is_read_without_copies(prefix):
    store = IndexedExamples(prefix)
    for array in (*store.lengths(), store.prompt_keys(), store.example_keys()):
        assert isinstance(array, np.memmap) and not array.flags.owndata and not array.flags.writeable


def test_the_older_form_has_no_keys_and_no_checksums(single):
    store = IndexedExamples(single)
    assert store.prompt_keys() is None and store.example_keys() is None
    assert store.sources == (SourceRange("x", 0, 4),)
    assert [path.name for path in store.files] == ["x.json", "x.bin", "x.idx"]
    with pytest.raises(ConfigError, match="x has no checksums: an older version"):
        store.blocks()


def test_ids_and_lengths_outlive_the_store(prefix):
    (prefix_ids, target_ids), (prefix_lengths, _) = IndexedExamples(prefix)[0], IndexedExamples(prefix).lengths()
    assert (prefix_ids.tolist(), target_ids.tolist(), prefix_lengths.tolist()) == (*EXAMPLES[0], [4, 2, 4, 3])


@pytest.mark.parametrize("vocab_size", [300, 65_536, 65_537])
def test_a_shard_is_what_megatron_itself_writes(tmp_path, monkeypatch, vocab_size):
    monkeypatch.setattr(shards, "COPIED_SEQUENCES", 3)  # so that blocks end within an example
    examples = [*EXAMPLES, ([6, vocab_size - 1, 7], [vocab_size - 1, 11])]
    write_store(tmp_path / "x", examples, FakeTokenizer(vocab_size))
    write_single(tmp_path / "stock", examples, vocab_size)
    for part in ("bin", "idx"):
        assert part_of(tmp_path / "x", part).read_bytes() == (tmp_path / f"stock.{part}").read_bytes()
    dataset = megatron().IndexedDataset(str(part_of(tmp_path / "x", "bin").with_suffix("")))
    assert dataset.document_indices.tolist() == [0, 2, 4, 6, 8, 10]
    assert [dataset[i].tolist() for i in range(10)] == [ids for example in examples for ids in example]
    assert examples_of(tmp_path / "x") == examples


def test_metadata(prefix):
    metadata = json.loads((prefix.parent / "v1.2 data.json").read_text())
    assert {name: metadata[name] for name in metadata if name not in ("settings", "sources", "sha256")} == {
        "format": 2, "tokenizer_fingerprint": "f" * 64, "vocab_size": 300, "boq": 6, "eoq": 7, "eoa": 11,
        "examples": 4, "tokens": 23, "max_row_length": 6}
    assert metadata["sources"][0]["shard"]["prefix_tokens"] == 13


def test_an_existing_store_is_kept(prefix):
    before = files_of(prefix)
    with pytest.raises(ConfigError, match="v1.2 data.json already there; choose another prefix"):
        write_store(prefix, EXAMPLES[:1])
    assert files_of(prefix) == before


def test_an_interrupted_write_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), IndexedExamplesWriter(tmp_path / "not yet" / "x", FakeTokenizer()) as writer:
        writer.add(np.array([6, 7]), np.array([11]))
        raise KeyboardInterrupt
    with pytest.raises(ConfigError, match="no example to write"):
        write_store(tmp_path / "x", [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("part", shards.PARTS)
def test_every_truncation_is_seen(prefix, part):
    path = part_of(prefix, part)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ConfigError, match=rf"{path}: truncated: {size} bytes.*run python tools/preprocess_data.py"):
            IndexedExamples(prefix)
    path.write_bytes(whole + b"\0\0")
    with pytest.raises(ConfigError, match=f"{part}: {len(whole) + 2} bytes, {len(whole)} were written"):
        IndexedExamples(prefix)
    path.write_bytes(whole)
    assert len(IndexedExamples(prefix)) == 4


@pytest.mark.parametrize("part", ["bin", "idx"])
def test_every_truncation_of_the_older_form_is_seen(single, part):
    path = single.parent / f"x.{part}"
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(ConfigError, match=rf"{path}: truncated.*run python tools/preprocess_data.py again"):
            IndexedExamples(single)
    path.write_bytes(whole + b"\0\0")
    with pytest.raises(ConfigError, match=f"{path}: "):
        IndexedExamples(single)


@pytest.mark.parametrize("form, part, change, message", [
    ("single", "idx", lambda data: b"X" + data[1:], "not a Megatron index"),
    ("single", "idx", lambda data: data[:17] + b"\x07" + data[18:], "not a Megatron index"),
    ("single", "json", lambda data: data[:-3], "not JSON"),
    ("single", "json", lambda data: b"[]", "has no tokenizer_fingerprint"),
    ("single", "json", lambda data: data.replace(b'"eoa"', b'"end"'), "has no eoa"),
    ("single", "json", lambda data: data.replace(b'"examples": 4', b'"examples": 5'),
     "speaks of 5 examples, the index of 4"),
    ("v1.2 data", "json", lambda data: data[:-3], "not JSON"),
    ("v1.2 data", "json", lambda data: data.replace(b'"examples": 4', b'"examples": 5'), "damaged: its contents"),
    ("v1.2 data", "json", lambda data: data.replace(b'"format": 2', b'"format": 3'), "of format 3, this version"),
])
def test_damaged_files_are_refused(prefix, single, form, part, change, message):
    prefix = single if form == "single" else prefix
    path = prefix.parent / f"{prefix.name}.{part}"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ConfigError, match=message) as refusal:
        IndexedExamples(prefix)
    assert str(path) in str(refusal.value) and "python tools/preprocess_data.py" in str(refusal.value)


@pytest.mark.parametrize("missing", [("bin",), ("idx",), ("bin", "idx"), ("json",)])
def test_missing_files_of_the_older_form_are_named(single, missing):
    for part in missing:
        (single.parent / f"x.{part}").unlink()
    with pytest.raises(ConfigError) as refusal:
        IndexedExamples(single)
    named = [part for part in ("bin", "idx", "json") if f"{single}.{part}" in str(refusal.value)]
    assert named == list(missing) and "tools/preprocess_data.py" in str(refusal.value)


@pytest.mark.parametrize("part", shards.PARTS)
def test_a_missing_shard_is_named(prefix, part):
    path = part_of(prefix, part)
    path.unlink()
    with pytest.raises(ConfigError, match=f"{path}: not there; .*python tools/preprocess_data.py"):
        IndexedExamples(prefix)


def test_the_file_of_a_dataset_is_not_its_prefix(prefix):
    with pytest.raises(ConfigError, match=f"{prefix}.json: a dataset is named by its prefix; give {prefix}$"):
        IndexedExamples(f"{prefix}.json")


def test_a_dataset_that_is_not_finished_says_so(prefix):
    (prefix.parent / f"{prefix.name}.json").unlink()
    with pytest.raises(ConfigError, match="v1.2 data.json missing; .*shards is not finished: run .*--merge"):
        IndexedExamples(prefix)


def test_a_shard_that_goes_while_it_is_read_is_named(prefix):
    store = IndexedExamples(prefix)
    path = part_of(prefix, "bin")
    path.unlink()
    with pytest.raises(ConfigError, match=f"{path}: not there; was the dataset written again while it is read?"):
        store[0]


@pytest.mark.parametrize("at, value, message", [
    (34 + 4 * 3, b"\0\0\0\0", "example 1 has an empty prefix or target"),
    (34 + 4 * 8 + 8 * 2, b"\xff", "its sequences do not follow each other"),
    (34 + 12 * 8 + 8 * 2, b"\x05", "its documents are not pairs"),
])
def test_an_index_that_does_not_fit_itself_is_refused(single, monkeypatch, at, value, message):
    monkeypatch.setattr(open_shard, "CHECKED_SEQUENCES", 3)
    path = single.parent / "x.idx"
    data = bytearray(path.read_bytes())
    data[at:at + len(value)] = value
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=f"{path}: {message}"):
        IndexedExamples(single)


def test_a_large_damaged_index_is_refused_at_the_example(prefix, monkeypatch):
    """Where the store is too large to be looked through."""
    monkeypatch.setattr(indexed_examples, "SCANNED_BYTES", -1)
    path = part_of(prefix, "idx")
    data = bytearray(path.read_bytes())
    data[34 + 4 * 8 + 8 * 2:34 + 4 * 8 + 8 * 3] = (1 << 40).to_bytes(8, "little")
    path.write_bytes(data)
    store = IndexedExamples(prefix)
    assert store[0][0].tolist() == EXAMPLES[0][0]
    with pytest.raises(ConfigError, match=f"{path}: example 1 lies outside"):
        store[1]


def test_documents_that_are_no_pairs_are_refused(single, tmp_path):
    builder = megatron().IndexedDatasetBuilder(str(tmp_path / "plain.bin"), dtype=np.uint16)
    builder.add_document(np.arange(7), [7])
    builder.add_document(np.arange(3), [3])
    builder.finalize(str(tmp_path / "plain.idx"))
    shutil.copy(f"{single}.json", tmp_path / "plain.json")
    with pytest.raises(ConfigError, match="plain.idx: its documents are not pairs"):
        IndexedExamples(tmp_path / "plain")


@pytest.mark.parametrize("ids, message", [
    ([([6, 9, 7], [50, 11]), ([6, 41, 42, 7], [52, 300, 11])], "example 1: token 1 of its target has the id 300"),
    ([([6, 511, 7], [50, 11]), ([6, 7], [11])], "example 0: token 1 of its prefix has the id 511"),
    ([([6, 7], [11]), ([6, 7], [11]), ([6, 7], [65535])], "example 2: token 0 of its target has the id 65535"),
])
def test_an_id_outside_the_vocabulary_is_refused_when_opened(tmp_path, ids, message):
    write_store(tmp_path / "x", ids)
    with pytest.raises(ConfigError, match=f"{tmp_path}/x, {message}, but the vocabulary has 300 entries; write"):
        IndexedExamples(tmp_path / "x")


def test_a_negative_id_is_refused_too(tmp_path):
    write_store(tmp_path / "x", [([6, 7], [11]), ([6, -1, 7], [11])], FakeTokenizer(70_000))
    with pytest.raises(ConfigError, match="example 1: token 1 of its prefix has the id -1"):
        IndexedExamples(tmp_path / "x")


@pytest.mark.parametrize("write", [write_store, write_single])
def test_a_store_too_large_to_scan_is_opened(tmp_path, monkeypatch, write):
    write(tmp_path / "x", [([6, 300, 7], [11])])
    monkeypatch.setattr(indexed_examples, "SCANNED_BYTES", 7)  # of 8
    assert IndexedExamples(tmp_path / "x")[0][0].tolist() == [6, 300, 7]


def test_another_tokenizer_is_refused(prefix):
    store = IndexedExamples(prefix)
    store.check_tokenizer("f" * 64)
    with pytest.raises(ConfigError, match="written with tokenizer ffffffffffff, not with 0000000000"):
        store.check_tokenizer("0" * 64)


def test_large_files_have_a_digest_for_each_block(prefix, monkeypatch, tmp_path):
    monkeypatch.setattr(shards, "BLOCK_BYTES", 16)
    write_store(tmp_path / "y", EXAMPLES)
    store = IndexedExamples(tmp_path / "y")
    blocks = store.blocks()
    path = part_of(tmp_path / "y", "bin")
    assert [(block.start, block.length) for block in blocks if block.path == path] == [(0, 16), (16, 16), (32, 14)]
    for block in blocks:
        block.verify()
    data = bytearray(path.read_bytes())
    data[20] ^= 1
    path.write_bytes(data)
    bad = [block for block in blocks if block.path == path][1]
    with pytest.raises(ConfigError, match=f"{path}: bytes 16 to 32 are not what was written"):
        bad.verify()
    assert sum(block.length for block in blocks) == sum(len(data) for name, data in files_of(tmp_path / "y").items()
                                                        if not name.endswith("json"))
