"""No input makes memory grow: not its size, not a row of it, not what is packed so tightly that it bursts."""
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
import zstandard

from hrm_megatron.config import ConfigError
from hrm_megatron.data.example import BadRow, Example, RowFormat
from hrm_megatron.data.readers import arrow, column_values, parquet, pieces, read_piece
from hrm_megatron.data.readers.arrow_bodies import unpacked_bytes
from hrm_megatron.data.readers.parquet_pages import pages
from tests.data.formats import FLAT
from tests.data.formats import arrow as arrow_file

GOOD = {"condition": "direct", "instruction": "2 + 3?", "response": "5"}


def table(responses):
    return pa.table({"condition": [""] * len(responses), "instruction": ["q"] * len(responses), "response": responses})


def kinds(path, rows, chunk_bytes=1 << 20):
    """Read a file; return what its rows are, and the most memory of Python and of Arrow on the way."""
    tracemalloc.start()
    before, most, found = pa.total_allocated_bytes(), 0, []
    try:
        for piece in pieces(path, chunk_bytes, rows):
            for _, example in read_piece(piece, rows):
                found.append(example.kind if isinstance(example, BadRow) else "good")
                most = max(most, pa.total_allocated_bytes() - before)
        return found, most, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", ["plain.jsonl", "one.jsonl.zst", "one.jsonl.gz", "groups.parquet", "stream.arrow"])
def test_memory_does_not_grow_with_the_input(tmp_path, name):
    def peak(count):
        FLAT[name]([{**GOOD, "response": f"{i} " + "x" * (37 * i % 400)} for i in range(60 * count)], tmp_path / name)
        _, columns, python = kinds(tmp_path / name, RowFormat(), 5_000)
        return columns + python
    assert peak(30) < 1.5 * peak(3) + 200_000


@pytest.mark.parametrize("packed", [False, True])
def test_a_line_of_any_length_is_refused_in_little_memory(tmp_path, packed):
    path = tmp_path / "a.jsonl"
    pack = zstandard.ZstdCompressor().compressobj() if packed else None
    good = json.dumps(GOOD).encode() + b"\n"
    with open(path, "wb") as file:
        for part in (good, b'{"response": "', *[b"z" * (1 << 20)] * 40, b'"}\n', good):
            file.write(pack.compress(part) if pack else part)
        if pack:
            file.write(pack.flush())
    found, _, python = kinds(path, RowFormat(max_characters=1_000), 1 << 18)
    assert found == ["good", "row too long", "good"] and python < 3_000_000


def test_a_batch_as_large_as_its_file_is_read_where_it_is(tmp_path):
    """Neither copied, nor left in memory behind the rows that were read."""
    def mapped():
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssFile:")[2].split()[0]) << 10
    rows, path = table(["w" * 20_000] * 3_000), tmp_path / "a.arrow"
    with pa.ipc.new_file(path, rows.schema) as writer:
        writer.write_table(rows)
    assert pa.ipc.open_file(path).num_record_batches == 1 and path.stat().st_size > 60_000_000
    del rows
    before, allocated, most, count = mapped(), pa.total_allocated_bytes(), 0, 0
    for piece in pieces(path):
        count += sum(isinstance(example, Example) for _, example in read_piece(piece))
        most = max(most, mapped() - before, pa.total_allocated_bytes() - allocated)
    assert count == 3_000 and most < 30_000_000


def test_a_value_of_any_length_is_refused_before_its_page_is_unpacked(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    pq.write_table(table(["short", "z" * 3_000_000]), path, compression="zstd", use_dictionary=False, row_group_size=1)
    monkeypatch.setattr(parquet, "PAGE_BYTES", 1_000_000)
    with pytest.raises(ConfigError, match=rf"{path}: row group 1 cannot be read \(response has a page of 3,000,0\d\d "
                                          "bytes.*: leave out rows that long, or use smaller pages"):
        kinds(path, RowFormat())


@pytest.mark.parametrize("name", ["a.parquet", "delta.parquet", "a.feather"])
def test_one_text_that_is_used_often_is_not_in_memory_as_often(tmp_path, monkeypatch, name):
    texts = table(["z" * 200_000] * 600)
    path = tmp_path / name
    if name == "a.feather":
        values = pa.DictionaryArray.from_arrays(pa.array(np.zeros(600, np.int32)), pa.array(["z" * 200_000]))
        feather.write_feather(texts.set_column(2, "response", values), path, compression="zstd")
    elif name == "a.parquet":
        pq.write_table(texts, path, compression="zstd", row_group_size=600)
    else:
        pq.write_table(texts, path, compression="zstd", use_dictionary=False, column_encoding="DELTA_BYTE_ARRAY")
    assert path.stat().st_size < 60_000
    monkeypatch.setattr(parquet, "EXPANDED_BYTES", 4_000_000)
    found, columns, python = kinds(path, RowFormat())
    assert found == ["good"] * 600 and columns < 25_000_000 and python < 12_000_000


TEXTS = [f"{i} " + "w" * 2_000 for i in range(300)]
TURNS = pa.list_(pa.struct([("role", pa.string_view()), ("content", pa.string_view())]))
SHARED = {  # what keeps a text apart from the rows that hold it
    "views": pa.array(TEXTS, pa.string_view()),
    "large dictionary": pa.array(TEXTS, pa.large_string()).dictionary_encode(),
    "dictionary of views": pa.DictionaryArray.from_arrays(np.arange(300), pa.array(TEXTS, pa.string_view())),
    "chats of views": pa.array([[dict(role="user", content="q"), dict(role="assistant", content=text)]
                                for text in TEXTS], TURNS)}


@pytest.mark.parametrize("name", SHARED)
def test_a_slice_is_as_long_as_its_own_texts(tmp_path, monkeypatch, name):
    """And a dictionary is looked through once, whatever the number of batches."""
    looked, check = [], column_values._check
    monkeypatch.setattr(column_values, "_check", lambda column: looked.append(column.nbytes) or check(column))
    chat = name.startswith("chats")
    rows = RowFormat(max_characters=2_500, default_condition="", shape="messages" if chat else "fields")
    data = pa.table({"messages": SHARED[name]}) if chat else table(["a"] * 300).set_column(1, "instruction",
                                                                                            SHARED[name])
    arrow_file(pa.ipc.new_stream, data, tmp_path / "a.arrow", 100)
    found = list(pieces(tmp_path / "a.arrow", 50_000, rows))
    assert 12 <= len(found) <= 24 and max(len(piece.part.batches) for piece in found) < 60_000
    read = [example for piece in found for _, example in read_piece(piece, rows)]
    assert [example.response if chat else example.instruction for example in read] == TEXTS
    assert "dictionary" not in name or sum(size > 500_000 for size in looked) == 1


def test_a_dictionary_that_parquet_keeps_is_read_seldom(tmp_path, monkeypatch):
    """Every batch of it has a copy."""
    monkeypatch.setattr(parquet, "EXPANDED_BYTES", 10_000)
    monkeypatch.setattr(parquet, "BATCH_ROWS", 10)
    pq.write_table(table(["a"] * 300).set_column(1, "instruction", pa.array(TEXTS).dictionary_encode()),
                   tmp_path / "a.parquet")
    file = pq.ParquetFile(tmp_path / "a.parquet")
    assert len(list(parquet._batches(tmp_path / "a.parquet", file, 0, [*GOOD]))) == 1
    assert [example.instruction for piece in pieces(tmp_path / "a.parquet", 50_000)
            for _, example in read_piece(piece)] == TEXTS


WRITTEN = {"plain": dict(use_dictionary=False), "dictionary": dict(), "v2": dict(data_page_version="2.0"),
           "small pages": dict(data_page_size=300, write_batch_size=10, use_dictionary=False),
           "checked": dict(write_page_checksum=True)}


@pytest.mark.parametrize("how", WRITTEN)
def test_headers_of_pages_add_up_to_what_the_footer_says(tmp_path, how):
    path = tmp_path / "a.parquet"
    turns = [[{"role": "user", "content": "q" * (i % 40)}] * (i % 5) for i in range(3_000)]
    data = table([f"{i} " + "é" * (i % 90) for i in range(2_999)] + ["y" * 20_000])
    pq.write_table(data.append_column("messages", pa.array(turns)), path, compression="gzip", row_group_size=1_100,
                   **WRITTEN[how])
    metadata = pq.ParquetFile(path).metadata
    with open(path, "rb") as file:
        for number in range(metadata.num_row_groups):
            for i in range(5):
                column = metadata.row_group(number).column(i)
                found = list(pages(file, column))
                assert sum(page.num_values for page in found) == column.num_values
                headers = column.total_uncompressed_size - sum(page.num_bytes for page in found)
                assert 10 * len(found) < headers < 1_000 * len(found)  # some statistics are in them
                assert sum(page.is_dictionary for page in found) == column.has_dictionary_page
                assert how != "small pages" or i != 2 or len(found) > 9


@pytest.mark.parametrize("kind", ["file", "stream"])
@pytest.mark.parametrize("codec", ["zstd", "lz4", None])
def test_packed_batches_say_their_size_and_are_refused_by_it(tmp_path, monkeypatch, codec, kind):
    path = tmp_path / "a.arrow"
    data = table(["x" * 1_000] * 500)
    make = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
    with make(path, data.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
        for batch in data.to_batches(max_chunksize=300):
            writer.write_batch(batch)
    whole = pa.py_buffer(path.read_bytes())
    sizes = list(unpacked_bytes(whole.slice(8) if kind == "file" else whole))
    texts = [300 * 1_000, 200 * 1_000] if codec else [0, 0]
    assert len(sizes) == 2 and all(text <= size <= 1.1 * text for text, size in zip(texts, sizes, strict=True))
    monkeypatch.setattr(arrow, "UNPACKED_BYTES", sizes[1])
    if codec:
        with pytest.raises(ConfigError, match=f"{path}: record batch 0 unpacks to {sizes[0]:,} bytes, more than"):
            kinds(path, RowFormat())
    else:
        assert kinds(path, RowFormat())[0] == ["good"] * 500
