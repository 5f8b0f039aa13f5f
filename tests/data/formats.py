"""The same rows in every kind of file that is read."""
import gzip
import json

import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import zstandard


def lines(rows):
    return b"".join(json.dumps(row, ensure_ascii=i % 2 == 0).encode() + b"\n" for i, row in enumerate(rows))


def table(rows):
    return pa.Table.from_pylist(rows)


def members(compress, rows):
    """Several members in one file, as parallel writers leave them."""
    cut = len(rows) // 3
    return compress(lines(rows[:cut])) + compress(lines(rows[cut:]))


def checked_zstd(data):
    """With a checksum, as the program zstd writes it."""
    return zstandard.ZstdCompressor(write_checksum=True).compress(data)


def zstd_with_skippable_frame(data):
    return b"\x52\x2a\x4d\x18" + (3).to_bytes(4, "little") + b"abc" + checked_zstd(data)


def write_parquet(**options):
    return lambda rows, path: pq.write_table(table(rows), path, **options)


def arrow(make, rows, path, rows_per_batch=5):
    data = rows if isinstance(rows, pa.Table) else table(rows)
    with pa.OSFile(str(path), "wb") as sink, make(sink, data.schema) as writer:
        for batch in data.to_batches(max_chunksize=rows_per_batch):
            writer.write_batch(batch)


def save_dataset(rows, path):
    """What `Dataset.save_to_disk` writes, with a cache beside the rows."""
    path.mkdir()
    cut = len(rows) // 2
    names = ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    for name, part in zip((*names, "cache-0a1b.arrow"), (rows[:cut], rows[cut:], rows), strict=True):
        arrow(pa.ipc.new_stream, part, path / name)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0a", "_split": "train"}
    (path / "state.json").write_text(json.dumps(state))
    (path / "dataset_info.json").write_text("{}")


def wide(rows, path):
    """Texts of the types that other writers choose, and columns that nobody asked for."""
    data = table(rows)
    data = pa.table({name: column.cast(pa.large_string()) if i else column.dictionary_encode() if
                     pa.types.is_string(column.type) else column
                     for i, (name, column) in enumerate(zip(data.schema.names, data.columns, strict=True))
                     if pa.types.is_string(column.type)} | {"picture": pa.array([b"\xff\x00"] * len(rows))})
    feather.write_feather(data, path, compression="zstd", chunksize=4)


def viewed(kind):
    """The type with texts behind views."""
    if pa.types.is_list(kind):
        return pa.list_(viewed(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(viewed(field.type)) for field in kind])
    return pa.string_view() if pa.types.is_string(kind) else kind


def views(rows, path):
    """As newer writers keep texts."""
    schema = pa.schema([field.with_type(viewed(field.type)) for field in table(rows).schema])
    arrow(pa.ipc.new_file, pa.Table.from_pylist(rows, schema), path)


FLAT = {  # name: write rows of texts to a path
    "plain.jsonl": lambda rows, path: path.write_bytes(lines(rows)),
    "one.jsonl.gz": lambda rows, path: path.write_bytes(gzip.compress(lines(rows))),
    "members.json.gz": lambda rows, path: path.write_bytes(members(gzip.compress, rows)),
    "one.jsonl.zst": lambda rows, path: path.write_bytes(checked_zstd(lines(rows))),
    "members.ndjson.zst": lambda rows, path: path.write_bytes(members(zstd_with_skippable_frame, rows)),
    "groups.parquet": write_parquet(row_group_size=6, compression="zstd", write_page_checksum=True),
    "delta.parquet": write_parquet(use_dictionary=False, compression="gzip",
                                   column_encoding="DELTA_BYTE_ARRAY", data_page_version="2.0"),
    "file.arrow": lambda rows, path: arrow(pa.ipc.new_file, rows, path),
    "stream.arrow": lambda rows, path: arrow(pa.ipc.new_stream, rows, path),
    "views.arrow": views,
    "wide.feather": wide,
    "saved": save_dataset,
}
NESTED = {name: FLAT[name] for name in ("plain.jsonl", "one.jsonl.zst", "groups.parquet", "file.arrow",
                                        "stream.arrow", "views.arrow", "saved")}
