"""Which files are read, what is named that is not, and files that are no jsonl told by their contents."""
import argparse
import bz2
import codecs
import glob
import gzip
import io
import json
import lzma
import os
import zipfile
from pathlib import Path, PurePath

import numpy as np
import pytest

from hrm_megatron.config import ConfigError
from hrm_megatron.data.example import RowFormat
from hrm_megatron.data.inputs import SHOWN_NAMES, add_input_flags, find_inputs
from hrm_megatron.data.text_files import HEAD_BYTES, read_lines

GOOD = {"condition": "direct", "instruction": "naïve?", "response": "5"}
ROW = json.dumps(GOOD, ensure_ascii=False)


def test_inputs_are_files_globs_and_folders(write_jsonl, tmp_path):
    b, a, deep = (write_jsonl(name, [GOOD]) for name in ("b.jsonl", "a.jsonl", "sub/deep/c.jsonl"))
    text = write_jsonl("notes.txt", [json.dumps(GOOD)])
    assert find_inputs([str(tmp_path)]) == [a, b, deep]
    assert find_inputs([str(b), str(tmp_path / "?.jsonl")]) == [b, a]
    assert find_inputs([str(text)]) == [text]
    assert find_inputs([str(tmp_path / "**/c.jsonl")]) == [deep]


@pytest.mark.parametrize("name, message", [
    ("absent.jsonl", "absent.jsonl matches no file"), ("*.parquet", "parquet matches no file"),
    ("empty", "empty has no file to read; .*jsonl"),
])
def test_inputs_that_match_nothing_are_refused(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=message):
        find_inputs([str(tmp_path / name)])


@pytest.mark.parametrize("flags, message", [
    (["contxt"], "invalid choice: 'contxt'"),
    (["input", "--json-keys", "condition", "input", "a"], "--ignore-fields input: --json-keys says that it is read"),
    (["context", "--split-sentences"], "--split-sentences is incompatible with --ignore-fields")])
def test_fields_that_cannot_be_ignored_are_refused(write_jsonl, tmp_path, tool, capsys, flags, message):
    arguments = ["--input", str(write_jsonl("a.jsonl", [GOOD])), "--output", str(tmp_path / "tok"), "--ignore-fields"]
    try:
        assert tool("train_tokenizer")([*arguments, *flags]) == 1
    except SystemExit as usage:
        assert usage.code == 2
    assert message in capsys.readouterr().err
    assert RowFormat(ignored_fields=("tools", "tools")).settings() == RowFormat(ignored_fields=("tools",)).settings()


@pytest.mark.parametrize("name", ["", "*.jsonl", "**/*.jsonl"])
def test_what_lies_beside_and_is_not_read_is_named(write_jsonl, tmp_path, caplog, name):
    b = write_jsonl("b.jsonl", [GOOD])
    packed = write_jsonl("b.jsonl.bz2", [b"anything"])
    assert find_inputs([os.path.join(tmp_path, name)]) == [b]
    assert [record.getMessage() for record in caplog.records] == [f"not read: {packed}"]


def test_nothing_is_named_where_all_is_read(write_jsonl, tmp_path, caplog):
    a, b = write_jsonl("a.jsonl", [GOOD]), write_jsonl("sub/b.jsonl", [GOOD])
    for inputs in ([tmp_path], [tmp_path / "**"], [tmp_path / "*.jsonl", tmp_path / "sub"], [a, b]):
        assert find_inputs(map(str, inputs)) == [a, b]
    assert not caplog.records


def test_linked_folders_pipes_and_hidden_files_are_named_too(write_jsonl, tmp_path, caplog):
    a, elsewhere = write_jsonl("in/a.jsonl", [GOOD]), write_jsonl("elsewhere/c.jsonl", [GOOD])
    (tmp_path / "in" / "link").symlink_to(elsewhere.parent)
    os.mkfifo(tmp_path / "in" / "pipe.jsonl")
    (tmp_path / "in" / ".note").touch()
    assert find_inputs([str(tmp_path / "in")]) == [a]
    assert all(name in caplog.text for name in ("in/link", "in/pipe.jsonl", "in/.note"))
    with pytest.raises(ConfigError, match="pipe.jsonl is no file that can be read twice"):
        find_inputs([str(tmp_path / "in" / "pipe.jsonl")])


def test_many_unread_files_are_counted(write_jsonl, tmp_path, caplog):
    write_jsonl("a.jsonl", [GOOD])
    for i in range(SHOWN_NAMES + 3):
        write_jsonl(f"{i}.txt", [])
    find_inputs([str(tmp_path)])
    assert f"{tmp_path}/{SHOWN_NAMES - 1}.txt and 3 more" in caplog.text and f"{SHOWN_NAMES}.txt" not in caplog.text


def test_unread_files_that_may_hold_rows_are_named_first(write_jsonl, tmp_path, caplog):
    write_jsonl("in/a.jsonl", [GOOD])
    likely = [write_jsonl(f"in/{name}", []) for name in ("a.jsonl.bak", "a.jsonl.bz2", "sub/u.json", "t.csv")]
    (tmp_path / "in" / "zlink").symlink_to(write_jsonl("elsewhere/c.jsonl", [GOOD]).parent)
    for name in ("A.txt", "README", ".t.csv", "a.txt", "b.py"):
        write_jsonl(f"in/{name}", [])
    find_inputs([str(tmp_path / "in")])
    names = ", ".join(map(str, [*likely, tmp_path / "in" / "zlink"]))
    assert [record.getMessage() for record in caplog.records] == [f"not read: {names} and 5 more"]


def test_many_files_are_not_held_against_each_other(write_jsonl, tmp_path, monkeypatch):
    for i in range(120):
        write_jsonl(f"{i}.jsonl", [GOOD])
        write_jsonl(f"{i}.csv", ["a,b"])
    compared, equal = [], PurePath.__eq__
    monkeypatch.setattr(PurePath, "__eq__", lambda one, other: compared.append(one) or equal(one, other))
    assert len(find_inputs([str(tmp_path)])) == len(find_inputs([f"{tmp_path}/*.jsonl"])) == 120
    (tmp_path / "dataset_info.json").touch()  # a cache of the datasets library
    assert len(find_inputs([str(tmp_path)])) == 120
    assert len(compared) < 15 * 240


def test_hidden_files_below_a_folder_are_named_and_not_read(write_jsonl, tmp_path, caplog):
    """As copies by editors and systems are, which no glob finds either."""
    seen, copy, system = (write_jsonl(f".in/{name}", [GOOD]) for name in (
        "a.jsonl", ".checkpoints/a.jsonl", "._a.jsonl"))
    assert find_inputs([str(tmp_path / ".in")]) == [seen]  # the folder itself may be hidden
    assert "not read: " in caplog.text and str(copy.parent) in caplog.text and str(system) in caplog.text
    assert find_inputs([str(copy)]) == [copy]


def test_a_glob_does_not_go_around_through_links(write_jsonl, tmp_path):
    first, deep, _ = (write_jsonl(name, [GOOD]) for name in ("in/a.jsonl", "in/sub/b.jsonl", "other/c.jsonl"))
    (tmp_path / "in" / "sub" / "up").symlink_to("..")
    for name in ("too", "three"):  # 2^40 ways, which no search ends
        (tmp_path / "in" / "sub" / name).symlink_to("..")
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "other")
    assert find_inputs([str(tmp_path / "in/**/*.jsonl")]) == [first, tmp_path / "in/linked/c.jsonl", deep]
    assert find_inputs([str(tmp_path / "in/**/sub/**/b.*")]) == [deep]


def test_a_file_that_has_two_names_by_links_is_read_once(write_jsonl, tmp_path, caplog):
    first, other = write_jsonl("a.jsonl", [GOOD]), write_jsonl("in/b.jsonl", [GOOD])
    (tmp_path / "in" / "link.jsonl").symlink_to(first)
    (tmp_path / "again").symlink_to(other.parent)
    for inputs in (["a.jsonl", "in"], ["*.jsonl", "in/*.jsonl"], ["a.jsonl", "in/b.jsonl", "again/link.jsonl"]):
        caplog.clear()
        assert find_inputs([str(tmp_path / name) for name in inputs]) == [first, other]
        assert "link.jsonl" in caplog.text and "read once, under the first of their names: " in caplog.text
    caplog.clear()
    assert find_inputs([str(tmp_path / "in")]) == [other, tmp_path / "in" / "link.jsonl"] and not caplog.records


@pytest.mark.parametrize("pattern", ["**", "**/*", "**/*.jsonl", "in/**", "./**/*.jsonl", "**/deep/*",
                                     "in//**/*.jsonl"])
def test_a_glob_finds_what_pythons_finds(write_jsonl, tmp_path, monkeypatch, pattern):
    for name in ("a.jsonl", "in/b.jsonl", "in/deep/c.jsonl", "in/.hidden/d.jsonl", "in/[x]/deep/e.jsonl"):
        write_jsonl(name, [GOOD])
    monkeypatch.chdir(tmp_path)
    wanted = {Path(match) for match in glob.glob(pattern, recursive=True) if os.path.isfile(match)}
    assert {*find_inputs([pattern])} == wanted != set()


def test_inputs_given_twice_are_all_read():
    parser = argparse.ArgumentParser()
    add_input_flags(parser)
    args = parser.parse_args(["--input", "a", "b", "--input", "c", "--ignore-fields", "input"])
    assert (args.input, args.ignore_fields) == (["a", "b", "c"], ["input"])
    assert parser.parse_args(["--input", "a"]).ignore_fields == []


def test_a_file_named_twice_is_read_once(write_jsonl, tmp_path, monkeypatch):
    path = write_jsonl("a.jsonl", [GOOD])
    monkeypatch.chdir(tmp_path)
    assert [file.name for file in find_inputs(["a.jsonl", str(path), "."])] == ["a.jsonl"]


@pytest.mark.parametrize("names, named", [
    (["data/train-0-of-1.jsonl", "data/test-0-of-1.jsonl"], ["test", "train"]),
    (["train/a.jsonl", "validation/a.jsonl"], ["train", "validation"]),
    (["my/Train.jsonl", "my/dev.jsonl"], ["train", "dev"]),
    (["json-train.arrow.jsonl", "json-test.arrow.jsonl"], ["test", "train"]),
    (["gsm8k_train.jsonl", "gsm8k.test.jsonl"], ["test", "train"]),
    (["train/a.jsonl", "train/b.jsonl"], []), (["training.jsonl", "testing.jsonl", "test.jsonl", "contest.jsonl"], [])])
def test_splits_that_are_read_together_are_named(write_jsonl, tmp_path, caplog, names, named):
    files = [write_jsonl(name, [GOOD]) for name in names]
    for given in ([tmp_path], [tmp_path / "**/*.jsonl"], files):  # a shell too makes names of a glob
        caplog.clear()
        assert {*find_inputs(map(str, given))} == {*files}
        said = [record.getMessage() for record in caplog.records]
        assert len(said) == bool(named) and all(f"{split} ({tmp_path}/" in said[0] for split in named)
        if named:
            assert said[0].startswith("--input: splits of a dataset are all read, to be trained on: ")


@pytest.mark.parametrize("name", [b"caf\xe9/a.jsonl", b"caf\xe9.jsonl"])
def test_a_name_that_is_not_utf8_is_refused(tmp_path, write_jsonl, name):
    path = write_jsonl(os.fsdecode(name), [GOOD])
    for given in (tmp_path, tmp_path / "**/*.jsonl", path):
        with pytest.raises(ConfigError, match=r"--input .*/caf\\xe9.*: the name is not UTF-8; rename the file"):
            find_inputs([str(given)])


def test_a_file_without_a_row_is_named(write_jsonl, tmp_path, caplog):
    good, blank = write_jsonl("a.jsonl", [GOOD]), write_jsonl("b.jsonl", [codecs.BOM_UTF8, "", "  "])
    late = write_jsonl("c.jsonl", [" " * HEAD_BYTES, GOOD])
    assert find_inputs([str(tmp_path)]) == [good, blank, late]
    assert [record.getMessage() for record in caplog.records] == [f"no row in: {blank}"]


def zipped():
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.jsonl", ROW)
    return buffer.getvalue()


def saved_array():
    buffer = io.BytesIO()
    np.save(buffer, np.arange(3))
    return buffer.getvalue()


FOREIGN = {  # contents that are not jsonl: what the message says
    "utf-16 with a mark": (ROW.encode("utf-16"), ["UTF-16", "iconv -f UTF-16 -t UTF-8"]),
    "utf-16 big": (codecs.BOM_UTF16_BE + ROW.encode("utf-16-be"), ["UTF-16", "iconv"]),
    "utf-16 without": (ROW.encode("utf-16-le"), ["UTF-16", "iconv -f UTF-16LE"]),
    "utf-32": (ROW.encode("utf-32"), ["UTF-32", "iconv -f UTF-32"]),
    "gzip in gzip": (gzip.compress(gzip.compress(ROW.encode())), ["gzip", "gunzip"]),
    "parquet in gzip": (gzip.compress(b"PAR1\x15\x04"), ["Parquet"]),
    "bzip2": (bz2.compress(ROW.encode()), ["bzip2", "bunzip2"]),
    "xz": (lzma.compress(ROW.encode()), ["xz", "unxz"]),
    "zip": (zipped(), ["zip", "unzip"]),
    "array file": (saved_array(), ["NumPy"]),
    "json array": (f" [{ROW},\n{ROW}]".encode(), ["a JSON array", "jq -c '.[]'"]),
    "json array of lines": (f"[\n{ROW},\n{ROW}\n]".encode(), ["a JSON array", "jq -c '.[]'"]),
    "pretty json": (json.dumps(GOOD, indent=2).encode(), ["JSON over several lines", "jq -c ."]),
    "csv": (b"condition,instruction,response\ndirect,2+3?,5\n", ["csv", "read_csv"]),
    "tsv with a mark": (codecs.BOM_UTF8 + b"condition\tinstruction\n", ["csv or the like"]),
    "html": (b"<!doctype html>\n<p>Not found, sorry</p>", ["HTML"]),
    "text": (b"Once upon a time\nthere was", ["begins with b'Once upon a time'"]),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_is_no_jsonl_is_named(tmp_path, kind):
    contents, parts = FOREIGN[kind]
    path = tmp_path / "a.jsonl"
    path.write_bytes(contents)
    with pytest.raises(ConfigError) as refusal:
        find_inputs([str(tmp_path)])
    message = str(refusal.value)
    assert message.startswith(f"{path}: ") and "not jsonl" in message and "\n" not in message
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("rows", [
    ["{", GOOD], ['ondition": "direct"}', GOOD], [b"\xfex", GOOD], ["a,b", GOOD],
    [ROW.encode("latin-1"), GOOD]])
def test_a_bad_first_row_is_left_to_the_rows(write_jsonl, rows):
    path = write_jsonl("a.jsonl", rows)
    assert find_inputs([str(path)]) == [path]


def test_lines_of_a_text_end_at_line_feeds_only(tmp_path):
    texts = ["a\u2028b", "c\x0bd\x0ce\x85f\x1cg", "", "h\ri", "j "]
    for mark, end, last in (("", "\n", ""), ("\ufeff", "\r\n", "\r\n"), ("", "\n", "\n")):
        (tmp_path / "prompts").write_bytes((mark + end.join(texts) + last).encode())
        assert read_lines(tmp_path / "prompts") == texts
    (tmp_path / "prompts").write_bytes(b"")
    assert read_lines(tmp_path / "prompts") == []
    (tmp_path / "prompts").write_text("\ufeffa\n\ufeffb \ufeff\n\ufeff")  # of three files that were joined
    assert read_lines(tmp_path / "prompts") == ["a", "b \ufeff"]


@pytest.mark.parametrize("encoding, part", [("utf-16", "UTF-16"), ("utf-16-le", "UTF-16"), ("latin-1", "at byte 2")])
def test_texts_in_other_encodings_are_refused(tmp_path, encoding, part):
    (tmp_path / "prompts").write_bytes("naïve".encode(encoding))
    with pytest.raises(ConfigError, match=rf"prompts: not UTF-8 \(.*{part}.*\); convert it, for example with iconv"):
        read_lines(tmp_path / "prompts")
