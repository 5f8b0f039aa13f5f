import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hrm_megatron.config import ConfigError
from hrm_megatron.data import preprocess as module
from hrm_megatron.data.indexed_examples import IndexedExamples
from hrm_megatron.data.preprocess import preprocess
from hrm_megatron.data.tokenizer import TextTokenizer
from hrm_megatron.data.tokenizer_training import learn_tokenizer
from tests.stores import examples_of, files_of

ROOT = Path(__file__).parents[2]
TAGS = ("", "cot", "noisy,synth")


def good_row(i):
    return {"condition": TAGS[i % 3], "instruction": f"What is {i} plus four? <|im_end|>" + "x" * (i % 7),
            "response": f"{i + 4}" + " é" * (i % 4)}


def expected(tokenizer, paths):
    rows = [json.loads(line) for path in paths for line in path.read_text().split("\n") if line]
    return [(tokenizer.encode_prefix(row["condition"], row["instruction"]), tokenizer.encode_response(row["response"]))
            for row in rows]


def test_the_store_holds_every_example_in_order(write_jsonl, tmp_path, tokenizer):
    paths = [write_jsonl("b.jsonl", map(good_row, range(5))), write_jsonl("a.jsonl", map(good_row, range(5, 18)))]
    report = preprocess(paths, tmp_path / "out" / "x", tokenizer)
    examples = expected(tokenizer, paths)
    assert examples_of(tmp_path / "out" / "x") == examples
    assert report.summary() == (
        f"18 examples, {sum(len(p) + len(t) for p, t in examples)} tokens, longest row "
        f"{max(len(p) + len(t) - 1 for p, t in examples)} positions, 0 responses truncated, 0 rows skipped")
    IndexedExamples(tmp_path / "out" / "x").check_tokenizer(tokenizer.fingerprint)


def test_output_and_first_error_do_not_depend_on_workers(write_jsonl, tmp_path, tokenizer):
    rows = [good_row(i) for i in range(60)]
    rows[20], rows[41] = "{", {**rows[41], "response": ""}
    path = write_jsonl("a.jsonl", rows)
    written, errors = [], []
    for workers, chunk_bytes in ((1, 1 << 20), (1, 100), (3, 300)):
        prefix = tmp_path / f"{workers}-{chunk_bytes}" / "x"
        with pytest.raises(ConfigError) as refusal:
            preprocess([path], prefix, tokenizer, workers, chunk_bytes=chunk_bytes)
        assert not prefix.parent.exists()
        errors.append(str(refusal.value))
        report = preprocess([path], prefix, tokenizer, workers, skip_bad_rows=True, chunk_bytes=chunk_bytes)
        written.append((files_of(prefix), report.summary(), report.lines()))
    assert errors[0] == errors[1] == errors[2] and errors[0].startswith(f"{path}:21: broken JSON")
    assert written[0] == written[1] == written[2] and len(written[0][0]) == 5
    assert [line.partition(str(path))[0::2] for line in written[0][2][:2]] == [
        ("skipped 1: broken JSON, first ", written[0][2][0].partition(str(path))[2]),
        ("skipped 1: empty field, first ", ":42: response='' is empty; fill it or drop the row")]
    assert [line[:9] for line in written[0][2][2:]] == ["lint: 58 "]  # texts with the string of a special token


@pytest.mark.parametrize("chunk_bytes", [1, 1 << 20])
def test_byte_order_marks_change_nothing(write_jsonl, tmp_path, tokenizer, chunk_bytes):
    rows, mark = [json.dumps(good_row(i)).encode() for i in range(4)], b"\xef\xbb\xbf"
    plain = write_jsonl("plain.jsonl", rows)
    marked = write_jsonl("marked.jsonl", [mark + rows[0], mark, rows[1], mark + rows[2], rows[3]])
    for path in (plain, marked):
        preprocess([path], tmp_path / "out" / path.stem, tokenizer, chunk_bytes=chunk_bytes)
    out = tmp_path / "out"
    assert examples_of(out / "marked") == examples_of(out / "plain") == expected(tokenizer, [plain])
    texts = [learn_tokenizer([path], tmp_path / f"{path.stem}-tok", 400).path.read_text() for path in (plain, marked)]
    assert texts[0] == texts[1] and "\ufeff" not in texts[1]


def test_long_responses_are_cut_and_long_prefixes_refused(write_jsonl, tmp_path, tokenizer):
    rows = [{"condition": "", "instruction": "a" * n, "response": "b" * m} for n, m in
            ((4, 5), (4, 6), (4, 99), (9, 3), (10, 3), (11, 3))]
    path = write_jsonl("a.jsonl", rows)
    whole = expected(tokenizer, [path])
    assert [len(prefix) for prefix, _ in whole] == [6, 6, 6, 11, 12, 13]
    context = 11
    report = preprocess([path], tmp_path / "x", tokenizer, context_size=context, skip_bad_rows=True)
    assert examples_of(tmp_path / "x") == [(prefix, target[:context + 1 - len(prefix)]) for prefix, target in whole[:4]]
    assert [target[-1] == tokenizer.eoa for _, target in examples_of(tmp_path / "x")] == [True, False, False, False]
    assert (report.truncated, report.manifest.totals["max_row_length"], dict(report.skipped)) == (
        3, context, {"prefix too long": 2})
    with pytest.raises(ConfigError, match=rf"{path}:5: the prefix alone takes 12 of 11 positions; shorten"):
        preprocess([path], tmp_path / "y", tokenizer, context_size=context)


def test_a_dead_worker_is_one_line(write_jsonl, tmp_path, tokenizer, monkeypatch):
    path = write_jsonl("a.jsonl", map(good_row, range(30)))
    monkeypatch.setattr(module, "_start_worker", _die)
    with pytest.raises(ConfigError, match="a worker process died.*fewer --workers"):
        preprocess([path], tmp_path / "out" / "x", tokenizer, workers=2, chunk_bytes=100)
    assert not (tmp_path / "out").exists()


def _die(tokenizer_path):
    os._exit(9)


BAD_RUNS = {
    "bad row": (lambda path: [path], [], [".jsonl:2: ", "'Cot'", "direct, cot"]),
    "no input": (lambda path: [f"{path}.absent"], [], ["absent matches no file", "--input"]),
    "bad keys": (lambda path: [path], ["--json-keys", "condition", "question", "response"],
                 [".jsonl:1: ", "'question'", "--json-keys"]),
    "no tokenizer": (lambda path: [path], ["--tokenizer-model", "nowhere"], ["nowhere", "tools/train_tokenizer.py"]),
    **{f"prefix {prefix!r}": (lambda path: [path], ["--output-prefix", prefix],
                              [f"--output-prefix {prefix!r}: ends without"])
       for prefix in ("", "out/", ".", "out/..")},
    "no workers": (lambda path: [path], ["--workers", "0"], ["--workers 0", "at least 1"]),
    "no context": (lambda path: [path], ["--context-size", "0"], ["--context-size 0", "at least 1"]),
    "nothing left": (lambda path: [path], ["--context-size", "2", "--on-bad-row", "skip"], ["no example to write"]),
}


@pytest.mark.parametrize("run", BAD_RUNS)
def test_refusals_are_one_line_and_leave_nothing(write_jsonl, tmp_path, tokenizer, tool, capsys, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    path = write_jsonl("in/a.jsonl", [good_row(0), {**good_row(1), "condition": "Cot"}])
    inputs, more, parts = BAD_RUNS[run]
    arguments = ["--input", *map(str, inputs(path)), "--output-prefix", str(tmp_path / "out" / "x"),
                 "--tokenizer-model", str(tokenizer.path), *more]
    assert tool("preprocess_data")(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert all(part in error for part in parts), error
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_the_tool_reports_and_replaces_other_settings_only_when_told(write_jsonl, tmp_path, tokenizer, tool, capsys):
    path = write_jsonl("a.jsonl", [{"tags": "cot", "q": "three", "a": "four"}, "{", {"tags": "", "q": "3", "a": "4"}])
    prefix = tmp_path / "x"
    arguments = ["--input", str(path), "--output-prefix", str(prefix), "--tokenizer-model", str(tokenizer.path.parent),
                 "--json-keys", "tags", "q", "a", "--on-bad-row", "skip"]
    assert tool("preprocess_data")(arguments) == 0
    printed = capsys.readouterr().out
    assert "2 examples" in printed and "1 rows skipped" in printed and f"broken JSON, first {path}:2: " in printed
    assert examples_of(prefix)[0] == (tokenizer.encode_prefix("cot", "three"), tokenizer.encode_response("four"))
    assert "\nsources: 1 added (a.jsonl)\n" in printed and " tokens made in " in printed
    before = files_of(prefix)
    with_other_keys = [*arguments[:-4], "a", "q", "--on-bad-row", "skip"]
    assert tool("preprocess_data")(with_other_keys) == 1
    refusal = capsys.readouterr().err
    assert f"error: {prefix} was made with json_keys=['tags', 'q', 'a'], not ['tags', 'a', 'q']; choose" in refusal
    assert "--overwrite" in refusal and files_of(prefix) == before
    assert tool("preprocess_data")([*with_other_keys, "--overwrite"]) == 0
    assert examples_of(prefix)[0] == (tokenizer.encode_prefix("cot", "four"), tokenizer.encode_response("three"))
    assert len(files_of(prefix)) == len(before)


def run_script(name, *arguments, **options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, ROOT / "tools" / f"{name}.py", *map(str, arguments)], text=True,
                          capture_output=True, env=environment, **options)


@pytest.mark.parametrize("bytes_free", [20_000, 70_000, 120_000])  # for the ids; for these, not the keys; nor the .idx
def test_a_full_disk_is_one_line_and_leaves_nothing(write_jsonl, tmp_path, tokenizer, bytes_free):
    path = write_jsonl("in/a.jsonl", [{"condition": "", "instruction": "3", "response": "4"}] * 5_000)

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_free, bytes_free))

    done = run_script("preprocess_data", "--input", path, "--output-prefix", tmp_path / "out" / "x",
                      "--tokenizer-model", tokenizer.path, preexec_fn=limit)
    *facts, error = done.stderr.splitlines()
    assert done.returncode == 1 and not [line for line in facts if "error" in line], done.stderr
    assert error.startswith(f"error: {tmp_path / 'out' / 'x'}: cannot write (File too large); free some space")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_both_tools_run_as_programs(write_jsonl, tmp_path):
    path = write_jsonl("a.jsonl", map(good_row, range(40)))
    done = run_script("train_tokenizer", "--input", path, "--output", tmp_path / "tok", "--vocab-size", 300)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'tok'}: 300 entries\n")
    shape = f"row shape: fields, as in {path}:1"
    assert done.stderr.splitlines() == [shape, "all texts are read; learning entries from them"]
    done = run_script("preprocess_data", "--input", path, "--output-prefix", tmp_path / "x", "--tokenizer-model",
                      tmp_path / "tok", "--workers", 2, "--tokenizer-engine", "tokenizers")
    assert done.returncode == 0 and done.stdout.startswith(f"{tmp_path / 'x'}: 40 examples, ")
    assert done.stderr.splitlines() == [shape]
    assert examples_of(tmp_path / "x") == expected(TextTokenizer(tmp_path / "tok"), [path])


def test_training_sees_the_first_characters_only(write_jsonl, tmp_path):
    rows = [{"condition": "", "instruction": "ab" * 3 + "qz" * 50, "response": "ab" * 3 + "qz" * 50}]
    path = write_jsonl("a.jsonl", rows)
    for max_chars, learns in ((6, False), (60, True)):
        tokenizer = learn_tokenizer([path], tmp_path / str(max_chars), 400, max_chars)
        assert tokenizer.tokenizer.token_to_id("ab") is not None
        assert (tokenizer.tokenizer.token_to_id("qz") is not None) == learns


@pytest.mark.parametrize("rows, more, parts", [
    ([good_row(0), "{"], [], [".jsonl:2: broken JSON"]),
    ([""], [], ["no examples in", "--input"]),
    ([good_row(0)], ["--vocab-size", "31"], ["vocab_size=31", "287"]),
    ([good_row(0)], ["--max-chars", "0"], ["--max-chars 0"]),
])
def test_training_refusals_are_one_line_and_leave_nothing(write_jsonl, tmp_path, tool, capsys, rows, more, parts):
    path = write_jsonl("in/a.jsonl", rows)
    assert tool("train_tokenizer")(["--input", str(path), "--output", str(tmp_path / "tok"), *more]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert all(part in error for part in parts), error
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


TOOLS = {"train_tokenizer": ["--output", "{folder}/made", "--vocab-size", "300"],
         "preprocess_data": ["--output-prefix", "{folder}/made", "--tokenizer-model", "{tokenizer}"]}


@pytest.fixture(params=TOOLS)
def call(request, tmp_path, tokenizer, tool, capsys):
    """Call a tool that reads rows with good flags and these; return (status, stdout, stderr)."""
    good = [word.format(folder=tmp_path, tokenizer=tokenizer.path) for word in TOOLS[request.param]]

    def call(*flags):
        status = tool(request.param)([*good, *map(str, flags)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err
    return call


def test_both_tools_read_rows_alike(write_jsonl, call):
    path = write_jsonl("in/a.jsonl", [{"q": "three", "a": "four"}, {"tags": None, "q": "3", "a": "4"}, "{"])
    keys = ["--json-keys", "tags", "q", "a"]
    status, out, err = call("--input", path, *keys)
    assert (status, out) == (1, "") and f"{path}:1: no field 'tags'" in err
    status, out, err = call("--input", path, *keys, "--default-condition", "direct")
    assert (status, out) == (1, "") and f"{path}:3: broken JSON" in err
    status, out, err = call("--input", path, *keys, "--default-condition", "loud")
    assert (status, out, err.count("\n")) == (1, "", 1) and "--default-condition loud: unknown tag" in err
    status, out, err = call("--input", path, *keys, "--default-condition", "direct", "--on-bad-row", "skip")
    assert (status, err) == (0, "") and f"\nskipped 1: broken JSON, first {path}:3: " in out


def test_a_default_condition_is_in_the_store_and_in_the_report(write_jsonl, tmp_path, tokenizer, tool, capsys):
    path = write_jsonl("a.jsonl", [{"instruction": "three", "response": "four"}, good_row(1)])
    arguments = ["--input", str(path), "--output-prefix", str(tmp_path / "x"), "--tokenizer-model", str(tokenizer.path)]
    assert tool("preprocess_data")([*arguments, "--default-condition", "synth,direct"]) == 0
    assert examples_of(tmp_path / "x")[0][0] == tokenizer.encode_prefix("synth,direct", "three")
    assert "\n1 rows have no condition and took the default, or that of a rule\n" in capsys.readouterr().out


@pytest.mark.parametrize("call", ["train_tokenizer"], indirect=True)
def test_the_same_input_is_kept_and_any_other_refused(write_jsonl, tmp_path, call):
    first, other = (write_jsonl(f"in/{name}.jsonl", map(good_row, range(9))) for name in "ab")
    os.utime(other, ns=(0, first.stat().st_mtime_ns))
    assert call("--input", first, "--keep-same")[0] == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    status, out, _ = call("--input", first, "--keep-same")
    assert (status, out) == (0, f"{tmp_path / 'made'}: made from the same input before, kept\n")
    refusals = [call("--input", other, "--keep-same"), call("--input", first, other, "--keep-same"),
                call("--input", first, "--default-condition", "cot", "--keep-same")]
    write_jsonl("in/a.jsonl", map(good_row, range(10)))
    refusals.append(call("--input", first, "--keep-same"))
    for (status, out, err), part in zip(refusals, (f"was made from {first} (", "from fewer files, not from ",
                                                   "with default_condition=None, not 'cot'", f"not from {first} ("),
                                        strict=True):
        assert (status, out, err.count("\n")) == (1, "", 1)
        assert part in err and err.endswith("; name another output, or replace this one with --overwrite\n"), err
    assert {path: path.read_bytes() for path in before if path != first} == {
        path: contents for path, contents in before.items() if path != first}
    assert call("--input", first, "--overwrite")[0] == call("--input", first, "--keep-same")[0] == 0


@pytest.mark.parametrize("call", ["train_tokenizer"], indirect=True)
def test_data_that_was_moved_is_the_same(write_jsonl, tmp_path, call):
    path = write_jsonl("in/a.jsonl", map(good_row, range(9)))
    assert call("--input", path, "--keep-same")[0] == 0
    path.parent.rename(tmp_path / "moved")
    assert "kept" in call("--input", tmp_path / "moved", "--keep-same")[1]


@pytest.mark.parametrize("call", ["train_tokenizer"], indirect=True)
def test_what_does_not_say_what_it_was_made_from_is_refused(write_jsonl, tmp_path, call):
    path = write_jsonl("in/a.jsonl", map(good_row, range(9)))
    assert call("--input", path)[0] == 0
    for record in [*tmp_path.glob("made.json"), *tmp_path.glob("made/made_from.json")]:
        record.write_text(json.dumps({name: value for name, value in json.loads(record.read_text()).items()
                                      if name not in ("made_from", "files")}))
    status, _, err = call("--input", path, "--keep-same")
    assert status == 1 and f"{tmp_path / 'made'} does not say what it was made from; name another" in err


def test_training_overwrites_only_when_told(write_jsonl, tmp_path, tool, capsys):
    path = write_jsonl("a.jsonl", map(good_row, range(9)))
    arguments = ["--input", str(path), "--output", str(tmp_path / "tok"), "--vocab-size"]
    assert tool("train_tokenizer")([*arguments, "290"]) == 0
    assert tool("train_tokenizer")([*arguments, "295"]) == 1
    assert "--overwrite" in capsys.readouterr().err and TextTokenizer(tmp_path / "tok").vocab_size == 290
    assert tool("train_tokenizer")([*arguments, "295", "--overwrite"]) == 0
    assert TextTokenizer(tmp_path / "tok").vocab_size == 295


def test_examples_of_one_response_token_survive(write_jsonl, tmp_path, tokenizer):
    path = write_jsonl("a.jsonl", [{"condition": "", "instruction": "a" * 8, "response": "b"}])
    preprocess([path], tmp_path / "x", tokenizer, context_size=10)
    (prefix, target), = examples_of(tmp_path / "x")
    assert (len(prefix), len(target)) == (10, 1)
    assert np.array_equal(IndexedExamples(tmp_path / "x").lengths(), [[10], [1]])
    assert json.loads((tmp_path / "x.json").read_text())["max_row_length"] == 10
