"""Rows come out of every kind of file with their places, in pieces, in bounded memory."""
import gzip
import json
import pickle
import random
import threading
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from hrm_megatron.config import ConfigError
from hrm_megatron.data import preprocess as preprocess_module
from hrm_megatron.data.example import BadRow, Example, RowFormat
from hrm_megatron.data.indexed_examples import IndexedExamples
from hrm_megatron.data.inputs import find_inputs
from hrm_megatron.data.preprocess import preprocess
from hrm_megatron.data.readers import ahead, is_blank, pieces, read_piece
from hrm_megatron.data.readers.column_values import Checks
from hrm_megatron.data.readers.columns import _slices
from tests.data.formats import FLAT, NESTED, arrow, checked_zstd, lines, save_dataset, table, viewed

GOOD = {"condition": "direct", "instruction": "2 + 3?", "response": "5"}
ROWS = RowFormat()


def read(path, chunk_bytes=1 << 20, rows=ROWS):
    """Read all pieces of a file as workers do: each is sent and read by itself."""
    return [(place, example) for piece in pieces(path, chunk_bytes, rows)
            for place, example in read_piece(pickle.loads(pickle.dumps(piece)), rows, Counter())]


def rows_of(count):
    return [{"condition": ("direct", "", "cot,synth")[i % 3],
             "instruction": f"What is {i} + é? " + "\U0001f600" * (i % 4),
             "response": f"{i} line\u2028\n" + "x" * (37 * i % 400)} for i in range(count)]


def write(name, rows, tmp_path):
    FLAT[name](rows, tmp_path / name)
    return find_inputs([str(tmp_path / name)])


@pytest.mark.parametrize("chunk_bytes", [1, 7, 64, 10_000])
def test_pieces_cover_a_file_at_line_ends(tmp_path, chunk_bytes):
    contents = b"first\n\nthird line is longer\r\nfourth\nlast without end"
    (tmp_path / "a").write_bytes(contents)
    (tmp_path / "empty").write_bytes(b"")
    assert not list(pieces(tmp_path / "empty", chunk_bytes))
    parts = []
    for piece in pieces(tmp_path / "a", chunk_bytes):
        parts.append(contents[piece.start_byte:piece.start_byte + piece.num_bytes])
        assert piece.first_line == contents[:piece.start_byte].count(b"\n") + 1
    assert b"".join(parts) == contents
    assert all(part.endswith(b"\n") for part in parts[:-1])


@pytest.mark.parametrize("chunk_bytes", [50, 3_000, 1 << 20])
def test_a_line_that_is_too_long_is_a_bad_row_wherever_it_is_cut(write_jsonl, chunk_bytes):
    rows = RowFormat(max_characters=20)
    long = {**GOOD, "response": "x" * 200_000}
    path = write_jsonl("a.jsonl", [GOOD, long, GOOD, {**GOOD, "instruction": "y" * 21}, GOOD, long])
    places, examples = zip(*read(path, chunk_bytes, rows), strict=True)
    assert places == tuple(f"{path}:{number}" for number in range(1, 7))
    assert [examples[i] for i in (0, 2, 4)] == [Example(**GOOD)] * 3
    num_bytes = len(json.dumps(long))
    assert [(examples[i].kind, str(examples[i])) for i in (1, 5)] == [
        ("row too long", f"{path}:{i}: a row of {num_bytes:,} bytes, --max-characters 20 reads at most 65,776; split "
                         "it or raise that") for i in (2, 6)]
    assert str(examples[3]).startswith(f"{path}:4: a text of 21 characters, --max-characters is 20; ")


def test_no_characters_at_all_are_refused():
    with pytest.raises(ConfigError, match="--max-characters 0: must be at least 1"):
        RowFormat(max_characters=0)


@pytest.mark.parametrize("chunk_bytes", [1, 700, 1 << 20])
@pytest.mark.parametrize("name", FLAT)
def test_every_kind_of_file_gives_the_same_examples_in_order(tmp_path, name, chunk_bytes):
    rows = rows_of(23)
    read_back = [example for path in write(name, rows, tmp_path) for _, example in read(path, chunk_bytes)]
    assert read_back == [Example(**row) for row in rows]


@pytest.mark.parametrize("name", NESTED)
def test_every_kind_of_file_gives_the_same_chats(tmp_path, name):
    chats = [{"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}."}]}
             for i in range(9)]
    rows = RowFormat(default_condition="direct", shape="messages")
    read_back = [example for path in write(name, chats, tmp_path) for _, example in read(path, 200, rows)]
    assert read_back == [Example("direct", f"{i}?", f"{i}.") for i in range(9)]


def test_every_kind_of_file_gives_the_same_store(tmp_path, tokenizer):
    """The same bytes where it is one file; a dataset of two files may be stored as two, with the same examples."""
    rows, stores, examples = rows_of(40), [], []
    for name in FLAT:
        folder = tmp_path / "out" / name
        preprocess(write(name, rows, tmp_path), folder / "x", tokenizer, workers=1, chunk_bytes=900)
        store = IndexedExamples(folder / "x")
        examples.append([[part.tolist() for part in store[i]] for i in range(len(store))])
        stores.append({path.suffix: path.read_bytes() for path in folder.rglob("*") if path.suffix not in ("", ".json")
                       and path.is_file()})
    single = [store for store, name in zip(stores, FLAT, strict=True) if name != "saved"]
    assert single == single[:1] * len(single) and {".bin", ".idx"} <= single[0].keys()
    assert examples == examples[:1] * len(FLAT) and len(examples[0]) == 40


def test_places_count_as_the_kind_of_file_does(tmp_path):
    rows = rows_of(14)
    rows[8]["response"] = " "
    places = {}
    for name in FLAT:
        for path in write(name, rows, tmp_path):
            bad = [(place, example) for place, example in read(path, 300) if isinstance(example, BadRow)]
            assert all(str(example).startswith(f"{place}: response=' ' is empty") for place, example in bad)
            places.update((path.name, place.removeprefix(f"{path}:")) for place, _ in bad)
    assert places == {
        **dict.fromkeys(("plain.jsonl", "one.jsonl.gz", "members.json.gz", "one.jsonl.zst", "members.ndjson.zst"), "9"),
        "groups.parquet": "row group 1, row 2", "delta.parquet": "row group 0, row 8",
        **dict.fromkeys(("file.arrow", "stream.arrow", "views.arrow"), "record batch 1, row 3"),
        "wide.feather": "record batch 2, row 0", "data-00001-of-00002.arrow": "record batch 0, row 1"}
    group = pq.ParquetFile(tmp_path / "groups.parquet").read_row_group(1)
    assert group.slice(2, 1).to_pylist() == [rows[8]]


def test_folders_take_all_kinds_and_leave_what_a_dataset_has_beside_its_rows(tmp_path, caplog):
    rows = rows_of(6)
    for name, write_file in FLAT.items():
        write_file(rows, tmp_path / name)
    (tmp_path / "README.md").write_text("about")
    files = find_inputs([str(tmp_path)])
    assert [str(file.relative_to(tmp_path)) for file in files] == sorted([
        *(name for name in FLAT if name != "saved"), "saved/data-00000-of-00002.arrow",
        "saved/data-00001-of-00002.arrow"])
    (unread,) = [record.getMessage() for record in caplog.records]
    assert unread == f"not read: {tmp_path}/saved/cache-0a1b.arrow, {tmp_path}/README.md"


def test_what_the_library_computed_is_not_read_beside_what_it_cached(tmp_path, caplog):
    """As load_dataset leaves it in its cache, and a dictionary of two splits saved to disk."""
    rows = rows_of(4)
    (tmp_path / "cache").mkdir()
    for name in ("json-train.arrow", "cache-0a1b.arrow", "cache-0a1b_00000_of_00002.arrow"):
        arrow(pa.ipc.new_stream, rows, tmp_path / "cache" / name)
    (tmp_path / "cache" / "dataset_info.json").write_text("{}")
    assert find_inputs([str(tmp_path / "cache")]) == [tmp_path / "cache" / "json-train.arrow"]
    assert caplog.messages == [f"not read: {tmp_path}/cache/cache-0a1b.arrow, "
                               f"{tmp_path}/cache/cache-0a1b_00000_of_00002.arrow"]
    caplog.clear()
    (tmp_path / "saved").mkdir()
    for split in ("train", "test"):
        save_dataset(rows, tmp_path / "saved" / split)
        (tmp_path / "saved" / split / "cache-0a1b.arrow").unlink()
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert len(find_inputs([str(tmp_path / "saved")])) == 4
    (said,) = caplog.messages
    assert f"train ({tmp_path}/saved/train/data-00000-of-00002.arrow)" in said and "not read" not in said


def test_a_file_and_its_packed_copy_are_read_and_named(tmp_path, caplog):
    for name in ("a.jsonl", "a.jsonl.gz"):
        (tmp_path / name).write_bytes(lines(rows_of(2)) if name == "a.jsonl" else gzip.compress(lines(rows_of(2))))
    assert len(find_inputs([str(tmp_path)])) == 2
    assert f"not packed: {tmp_path}/a.jsonl.gz" in caplog.text


@pytest.mark.parametrize("state, message", [
    ('{"_data_files": [{"filename": "data-7.arrow"}]}', "data-7.arrow: missing from a dataset saved to disk"),
    ('{"_data_files": [], "_indices_data_files": [{"filename": "i"}]}', "flatten_indices"),
    ('{"_data_files"', "state.json: not that of a dataset"), ("[]", "state.json: not that of a dataset")])
def test_a_saved_dataset_that_is_not_whole_is_refused(tmp_path, state, message):
    save_dataset(rows_of(4), tmp_path / "saved")
    (tmp_path / "saved" / "state.json").write_text(state)
    with pytest.raises(ConfigError, match=message):
        find_inputs([str(tmp_path)])


@pytest.mark.parametrize("name", FLAT)
def test_files_without_a_row_are_named(tmp_path, caplog, name):
    rows = rows_of(2)
    FLAT[name](rows, tmp_path / name)
    empty = table(rows).schema.empty_table()
    if "parquet" in name:
        pq.write_table(empty, tmp_path / name)
    elif name in ("file.arrow", "stream.arrow"):
        with (pa.ipc.new_file if name == "file.arrow" else pa.ipc.new_stream)(tmp_path / name, empty.schema):
            pass
    elif "json" in name:
        compress = gzip.compress if "gz" in name else zstandard.compress if "zst" in name else bytes
        (tmp_path / name).write_bytes(compress(b" \n\n"))
    else:
        return
    assert is_blank(tmp_path / name)
    assert find_inputs([str(tmp_path / name)]) == [tmp_path / name]
    assert [record.getMessage() for record in caplog.records] == [f"no row in: {tmp_path / name}"]


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.feather", "a.jsonl.gz", "a.jsonl.zst"])
def test_an_empty_file_whose_kind_is_never_empty_is_refused(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(ConfigError, match=rf"{name}: empty, which no \.\w+ file is"):
        find_inputs([str(tmp_path)])


PACKED = [name for name in FLAT if name not in ("plain.jsonl", "saved")]


@pytest.mark.parametrize("name", PACKED)
def test_a_file_that_was_cut_is_refused_by_name(tmp_path, name):
    path, = write(name, rows_of(60), tmp_path)
    whole = path.read_bytes()
    for kept in {*range(len(whole) // 7, len(whole), len(whole) // 7), len(whole) - 1}:
        path.write_bytes(whole[:kept])
        with pytest.raises(ConfigError) as refusal:
            is_blank(path), read(path)
        assert str(refusal.value).startswith(f"{path}: ") and "\n" not in str(refusal.value), kept


@pytest.mark.parametrize("name", PACKED)
def test_damage_is_refused_by_name_or_stays_within_texts(tmp_path, name):
    """No damage ends in a traceback or a crash, and where all of a file has checksums, none is read."""
    path, = write(name, rows_of(60), tmp_path)
    whole, sound, refused = path.read_bytes(), read(path), 0
    chance = random.Random(name)
    for _ in range(40):
        place = chance.randrange(len(whole))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << chance.randrange(8)]) + whole[place + 1:])
        try:
            blank, found = is_blank(path), read(path)
        except ConfigError as error:
            assert str(error).startswith(str(path)) and "\n" not in str(error), error
            refused += 1
        else:
            assert not blank and (found == sound or name not in CHECKED)
    assert refused


CHECKED = ("one.jsonl.gz", "members.json.gz", "one.jsonl.zst")


def test_damage_of_a_group_is_named_with_it(tmp_path):
    path, = write("groups.parquet", rows_of(60), tmp_path)
    whole = bytearray(path.read_bytes())
    column = pq.ParquetFile(path).metadata.row_group(7).column(2)
    whole[column.dictionary_page_offset + column.total_compressed_size - 2] ^= 16
    path.write_bytes(whole)
    with pytest.raises(ConfigError, match=rf"{path}: row group 7 cannot be read \(.*\); copy or write it again"):
        read(path)


def test_packed_lines_are_damaged_behind_a_place(tmp_path):
    path = tmp_path / "a.jsonl.zst"
    path.write_bytes(checked_zstd(lines(rows_of(60)))[:-9])
    with pytest.raises(ConfigError, match=rf"{path}: zstd cannot be unpacked behind byte 0 of its contents \(Trunc"):
        read(path)
    window = zstandard.ZstdCompressionParameters.from_level(3, window_log=29, enable_ldm=True)
    packer = zstandard.ZstdCompressor(compression_params=window).compressobj()
    path.write_bytes(packer.compress(lines(rows_of(60))) + packer.flush())
    with pytest.raises(ConfigError, match="too much memory.*; pack it again without --long"):
        is_blank(path)


@pytest.mark.parametrize("name", ["file.arrow", "groups.parquet", "views.arrow", "dictionary.arrow"])
@pytest.mark.parametrize("nested", [False, True])
def test_columns_that_are_not_utf8_are_bad_rows(tmp_path, name, nested):
    texts = pa.array([b"ok", b"caf\xe9", b"fine"]).view(pa.string())
    if name == "dictionary.arrow" and not nested:
        texts = pa.DictionaryArray.from_arrays(pa.array([0, 1, 2]), texts)
    if nested:
        turns = [pa.array(["user"] * 3), texts]
        answers = [pa.array(["assistant"] * 3), pa.array(["a"] * 3)]
        pairs = pa.concat_arrays([pa.StructArray.from_arrays(t, ["role", "content"]) for t in (turns, answers)])
        pairs = pairs.take(pa.array([0, 3, 1, 4, 2, 5]))
        data = pa.table({"messages": pa.ListArray.from_arrays([0, 2, 4, 6], pairs)})
    else:
        data = pa.table({"condition": [""] * 3, "instruction": texts, "response": ["a"] * 3})
    if name == "views.arrow":
        data = data.cast(pa.schema([field.with_type(viewed(field.type)) for field in data.schema]))
    path = tmp_path / name
    if name.endswith(".arrow"):
        with pa.ipc.new_file(path, data.schema) as writer:
            writer.write_table(data)
    else:
        pq.write_table(data, path)
    found = read(path, rows=RowFormat(default_condition="", shape="messages" if nested else "fields"))
    assert [example.instruction for _, example in found if isinstance(example, Example)] == ["ok", "fine"]
    (place, bad), = [(place, example) for place, example in found if isinstance(example, BadRow)]
    assert place.endswith(" 0, row 1") and bad.kind == "not UTF-8"
    assert str(bad).startswith(f"{place}: not UTF-8 (unexpected end of data at byte 3 of a text); correct the row")


@pytest.mark.parametrize("column", [
    pa.DictionaryArray.from_arrays(pa.array([0, 2, 1]), pa.array(["a", "b"]), safe=False),
    pa.Array.from_buffers(pa.string_view(), 3, [None, pa.py_buffer(np.array(
        [[1, 97, 0, 0], [20, 97, 0, 5], [1, 98, 0, 0]], np.int32).tobytes()), pa.py_buffer(b"a" * 24)])])
def test_what_leads_out_of_the_texts_is_damage(column):
    batch = pa.RecordBatch.from_arrays([pa.array([""] * 3), column, pa.array(["b"] * 3)], [*GOOD])
    with pytest.raises(pa.ArrowException):
        list(_slices([batch], 1 << 20, Checks()))


def test_columns_of_other_types_are_bad_rows_that_name_their_values(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"condition": [""] * 2, "instruction": [b"a", b"b"], "response": [5, 6]}), path)
    (_, bad), _ = read(path)
    assert "instruction=b'a' is not a string; decode it" in str(bad)
    pq.write_table(pa.table({"tags": [""], "instruction": ["a"], "answer": ["b"]}), path)
    (_, bad), = read(path)
    assert "no field 'response' (there are ['answer', 'instruction', 'tags'])" in str(bad)
    twice = pa.Table.from_arrays([pa.array(["a"])] * 2, ["response", "response"])
    with pa.ipc.new_stream(tmp_path / "a.arrow", twice.schema) as writer:
        writer.write_table(twice)
    with pytest.raises(ConfigError, match="a.arrow: two columns 'response'; rename one"):
        read(tmp_path / "a.arrow")


@pytest.mark.parametrize("name", ["one.jsonl.zst", "groups.parquet", "stream.arrow", "wide.feather"])
def test_a_row_that_is_too_long_is_left_out_of_columns_too(tmp_path, name):
    rows = rows_of(5)
    rows[2]["response"] = "y" * 300_000
    rows[4]["response"] = "y" * 501
    path, = write(name, rows, tmp_path)
    kinds = [example.kind if isinstance(example, BadRow) else "" for _, example in
             read(path, 500, RowFormat(max_characters=500))]
    assert kinds == ["", "", "row too long", "", "row too long"]


@pytest.mark.parametrize("readers", [2, 3, 50])
def test_row_groups_that_are_read_at_a_time_come_out_in_order(tmp_path, readers, monkeypatch):
    rows = rows_of(200)
    pq.write_table(table(rows), tmp_path / "a.parquet", row_group_size=9)
    want = list(pieces(tmp_path / "a.parquet", 300))
    assert len(want) > 60
    before = set(threading.enumerate())
    assert list(pieces(tmp_path / "a.parquet", 300, readers=readers)) == want
    monkeypatch.setattr(ahead, "QUEUED", 1)  # a thread that is ahead waits, and so has not ended
    begun = pieces(tmp_path / "a.parquet", 300, readers=readers)
    assert [next(begun) for _ in range(5)] == want[:5] and set(threading.enumerate()) > before
    begun.close()
    assert set(threading.enumerate()) == before, "threads are left behind a reader that was given up"


def test_a_damaged_row_group_is_named_behind_all_rows_before_it(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(table(rows_of(200)), path, row_group_size=20, compression="zstd", write_page_checksum=True)
    column = pq.ParquetFile(path).metadata.row_group(6).column(1)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset + 3 * column.total_compressed_size // 4] ^= 0xFF
    path.write_bytes(data)
    found = {}
    for readers in (1, 4):
        found[readers] = []
        with pytest.raises(ConfigError, match="a.parquet: row group 6 cannot be read"):
            found[readers].extend(iter(pieces(path, 500, readers=readers)))
    assert found[1] == found[4] and found[1][-1].group == "row group 5"


def test_the_store_does_not_depend_on_how_many_read(tmp_path, tokenizer, monkeypatch):
    pq.write_table(table(rows_of(150)), tmp_path / "a.parquet", row_group_size=7)
    monkeypatch.setattr(preprocess_module, "WORKERS_PER_READER", 1)
    stores = []
    for workers in (1, 2):
        assert preprocess([tmp_path / "a.parquet"], tmp_path / str(workers), tokenizer, workers, chunk_bytes=400)
        stores.append({path.name: path.read_bytes() for path in (tmp_path / f"{workers}.shards").iterdir()
                       if path.name != ".lock"})  # it holds the time
    assert stores[0] == stores[1] and len(stores[0]) >= 3


def test_a_damaged_page_header_is_named_whatever_it_says(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(table(rows_of(20)), path)
    column = pq.ParquetFile(path).metadata.row_group(0).column(1)
    whole, refused = path.read_bytes(), 0
    for at in range(column.dictionary_page_offset, column.dictionary_page_offset + 24):
        for value in (0x00, 0x11, 0x15, 0x1C, 0xFF):
            path.write_bytes(whole[:at] + bytes([value]) + whole[at + 1:])
            try:
                list(pieces(path))
            except ConfigError as error:
                refused += 1
                assert "a.parquet: row group 0 cannot be read" in str(error)
    assert refused > 30
