"""A dataset follows its sources: what is the same is kept, and the result is that of one run over all of them."""
import json
import multiprocessing
import os
from itertools import permutations
from pathlib import Path

import pytest

from hrm_megatron.config import ConfigError
from hrm_megatron.data import incremental
from hrm_megatron.data import preprocess as module
from hrm_megatron.data.dataset_folder import LOCK, DatasetFolder, Task
from hrm_megatron.data.incremental import Input, share_of
from hrm_megatron.data.indexed_examples import IndexedExamples
from hrm_megatron.data.manifest import READING, write_sealed
from hrm_megatron.data.preprocess import preprocess
from hrm_megatron.data.source_names import source_names
from tests.stores import examples_of, files_of, write_single


def rows(name, count):
    return [{"condition": "", "instruction": f"What is {name} + {i}?", "response": f"{name}{i}"} for i in range(count)]


@pytest.fixture
def sources(write_jsonl):
    return [write_jsonl(f"in/{name}.jsonl", rows(name, count)) for name, count in (("a", 5), ("b", 9), ("c", 2))]


@pytest.fixture
def encoded(monkeypatch):
    """Names of the files that were spelled, one for each piece."""
    names = []
    encode = module.encode_chunk
    monkeypatch.setattr(module, "encode_chunk", lambda tokenizer, piece, *rest: names.append(piece.path.name)
                        or encode(tokenizer, piece, *rest))
    return names


@pytest.fixture
def update(tmp_path, tokenizer):
    def update(paths, name="x", **options):
        return preprocess(paths, tmp_path / name / "x", tokenizer, **options)
    update.tokenizer = tokenizer
    return update


def test_what_has_not_changed_is_not_read_again(update, sources, encoded, tmp_path, write_jsonl):
    update(sources)
    assert encoded == ["a.jsonl", "b.jsonl", "c.jsonl"]
    before = files_of(tmp_path / "x" / "x")
    stamp = (tmp_path / "x" / "x.json").stat().st_mtime_ns
    assert str(update(sources).changes) == "sources: 3 kept"
    assert len(encoded) == 3 and (tmp_path / "x" / "x.json").stat().st_mtime_ns == stamp
    assert files_of(tmp_path / "x" / "x") == before

    write_jsonl("in/b.jsonl", rows("other", 9))
    changed = [sources[2], write_jsonl("in/d.jsonl", rows("d", 3)), sources[1]]
    assert str(update(changed).changes) == ("sources: 1 kept, 1 added (d.jsonl), 1 changed (b.jsonl), "
                                            "1 removed (a.jsonl)")
    assert encoded[3:] == ["d.jsonl", "b.jsonl"]
    update(changed, "fresh")
    assert files_of(tmp_path / "x" / "x") == files_of(tmp_path / "fresh" / "x")
    assert [source.name for source in IndexedExamples(tmp_path / "x" / "x").sources] == [
        "c.jsonl", "d.jsonl", "b.jsonl"]


def test_times_and_sizes_tell_changes_and_contents_have_the_last_word(update, sources, encoded, tmp_path,
                                                                             monkeypatch):
    update(sources)
    os.utime(sources[0], ns=(1, 1))  # touched
    sources[1].write_text(sources[1].read_text().replace("b8", "b9"))  # of the same size
    assert str(update(sources).changes) == "sources: 2 kept, 1 changed (b.jsonl)"
    assert encoded[3:] == ["b.jsonl"]
    update(sources, "fresh")
    assert files_of(tmp_path / "x" / "x") == files_of(tmp_path / "fresh" / "x")
    monkeypatch.setattr(incremental, "sha256_of", None)
    update(sources)  # times are known again: nothing is read


def test_many_sources_are_not_held_against_each_other(update, write_jsonl, monkeypatch):
    paths = [write_jsonl(f"in/{i}.jsonl", rows(f"{i}", 1)) for i in range(40)]
    compared, equal = [], Input.__eq__
    monkeypatch.setattr(Input, "__eq__", lambda one, other: compared.append(one) or equal(one, other))
    assert len(update(paths).changes.added) == 40 and len(compared) < 3 * 40


def test_a_damaged_shard_is_made_again(update, sources, encoded, tmp_path):
    update(sources)
    before = files_of(tmp_path / "x" / "x")
    names = [json.loads(before["x.json"])["sources"][i]["shard"]["name"] for i in range(3)]
    (tmp_path / "x" / "x.shards" / f"{names[0]}.bin").unlink()
    with open(tmp_path / "x" / "x.shards" / f"{names[2]}.idx", "ab") as file:
        file.write(b"0")
    assert str(update(sources).changes) == "sources: 1 kept, 2 mended (a.jsonl, c.jsonl)"
    assert encoded[3:] == ["a.jsonl", "c.jsonl"] and files_of(tmp_path / "x" / "x") == before


def test_equal_rows_share_a_shard(update, write_jsonl, tmp_path):
    paths = [write_jsonl(f"in/{name}.jsonl", rows("a", 4)) for name in ("one", "two")]
    update([*paths, write_jsonl("in/three.jsonl", rows("b", 1))])
    prefix = tmp_path / "x" / "x"
    assert len(list(Path(f"{prefix}.shards").glob("*.bin"))) == 2
    store = IndexedExamples(prefix)
    assert [(source.name, source.first, source.count) for source in store.sources] == [
        ("one.jsonl", 0, 4), ("two.jsonl", 4, 4), ("three.jsonl", 8, 1)]
    assert examples_of(prefix)[:4] == examples_of(prefix)[4:8]
    assert str(update([paths[1]]).changes) == "sources: 1 kept, 2 removed (one.jsonl, three.jsonl)"
    assert len(examples_of(prefix)) == 4 and len(list(Path(f"{prefix}.shards").glob("*.bin"))) == 1


def test_sources_without_examples_are_remembered(update, write_jsonl, sources, encoded, tmp_path):
    paths = [write_jsonl("in/empty.jsonl", []), sources[0], write_jsonl("in/bad.jsonl", ["{", "["])]
    paths[0].write_bytes(b"")
    report = update(paths, skip_bad_rows=True)
    assert report.skipped == {"broken JSON": 2} and [source.name for source in IndexedExamples(
        tmp_path / "x" / "x").sources] == ["a.jsonl"]
    count = len(encoded)
    report = update(paths, skip_bad_rows=True)
    assert str(report.changes) == "sources: 3 kept" and report.skipped == {"broken JSON": 2} and len(encoded) == count


def test_rows_that_were_skipped_are_refused_when_they_are_errors(update, write_jsonl, tmp_path):
    path = write_jsonl("in/a.jsonl", [*rows("a", 3), "{"])
    update([path], skip_bad_rows=True)
    before = files_of(tmp_path / "x" / "x")
    with pytest.raises(ConfigError, match="a.jsonl:4: broken JSON"):
        update([path])
    assert files_of(tmp_path / "x" / "x") == before
    path = write_jsonl("in/a.jsonl", rows("a", 3))
    assert str(update([path]).changes) == "sources: 1 changed (a.jsonl)"


def test_what_was_finished_before_an_error_is_kept(update, write_jsonl, sources, encoded, tmp_path):
    bad = write_jsonl("in/bad.jsonl", ["{"])
    for workers in (1, 2):
        with pytest.raises(ConfigError, match="bad.jsonl:1: broken JSON"):
            update([*sources[:2], bad], workers=workers)
        assert encoded == ["a.jsonl", "b.jsonl", *["bad.jsonl"] * (workers == 1)] or workers == 2
        encoded.clear()
    with pytest.raises(ConfigError, match="x.json missing; .*x.shards is not finished"):
        IndexedExamples(tmp_path / "x" / "x")
    bad.write_text(json.dumps(rows("bad", 1)[0]))
    update([*sources[:2], bad])
    assert encoded == ["bad.jsonl"]
    update([*sources[:2], bad], "fresh")
    assert files_of(tmp_path / "x" / "x") == files_of(tmp_path / "fresh" / "x")


def test_a_source_that_changes_while_it_is_read_is_refused(update, sources, monkeypatch, tmp_path):
    encode = module.encode_chunk

    def touch(tokenizer, piece, *rest):
        os.utime(piece.path, ns=(1, 1))
        return encode(tokenizer, piece, *rest)

    monkeypatch.setattr(module, "encode_chunk", touch)
    with pytest.raises(ConfigError, match="a.jsonl was changed while it was read; run the command again"):
        update(sources[:1])
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("options, message", [
    (dict(context_size=99), "was made with context_size=4096, not 99; choose another --output-prefix, or .*--overwri"),
    (dict(other=True), "was made from a.jsonl and 2 more, nothing of which is among --input"),
])
def test_other_settings_and_other_data_are_refused(update, sources, write_jsonl, tmp_path, options, message):
    update(sources)
    before = files_of(tmp_path / "x" / "x")
    paths = [write_jsonl("in/z.jsonl", rows("z", 2))] if options.pop("other", False) else sources
    with pytest.raises(ConfigError, match=message):
        update(paths, **options)
    assert files_of(tmp_path / "x" / "x") == before
    update(paths, overwrite=True, **options)
    update(paths, "fresh", **options)
    assert files_of(tmp_path / "x" / "x") == files_of(tmp_path / "fresh" / "x")


def test_sources_that_an_older_version_read_are_counted_until_all_is_made_again(update, sources, tmp_path, caplog):
    update(sources[:2])
    path = tmp_path / "x" / "x.json"
    content = json.loads(path.read_text())
    for source in content["sources"]:
        assert source.pop("reading") == READING
    del content["sha256"]
    write_sealed(path, content, tmp_path)
    for changes in ("2 kept, 1 added (c.jsonl)", "3 kept"):
        caplog.clear()
        assert str(update(sources).changes) == f"sources: {changes}"
        assert [f"{tmp_path}/x/x: 2 of 3 sources were read by an older version and stay so. " in line
                for line in caplog.messages if "older" in line] == [True]
    caplog.clear()
    update(sources, overwrite=True)
    assert "older" not in caplog.text


def test_a_dataset_of_the_older_form_is_replaced_only_when_told(update, sources, tmp_path):
    (tmp_path / "x").mkdir()
    write_single(tmp_path / "x" / "x", [([6, 7], [11])])
    with pytest.raises(ConfigError, match="x.bin, .*x.idx, .*x.json already there, without shards; pass --overwrite"):
        update(sources)
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["x.bin", "x.idx", "x.json"]
    update(sources, overwrite=True)
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["x.json", "x.shards"]


def test_overwriting_by_nothing_leaves_what_was_there(update, write_jsonl, sources, tmp_path):
    bad = write_jsonl("in/bad.jsonl", ["{"])
    update(sources)
    write_single(tmp_path / "x" / "old", [([6, 7], [11])])

    def contents():  # but for the locks, which name their last holder
        return {path: path.read_bytes() for path in (tmp_path / "x").rglob("*") if path.is_file() and path.name != LOCK}
    before = contents()
    for name in ("x", "old"):
        with pytest.raises(ConfigError, match="no example to write; skipped 1: "):
            preprocess([bad], tmp_path / "x" / name, update.tokenizer, overwrite=True, skip_bad_rows=True)
        after = contents()
        assert {path: after[path] for path in before} == before
    assert examples_of(tmp_path / "x" / "x")


def test_overwriting_takes_nothing_over_but_from_a_run_that_overwrote(update, write_jsonl, sources, encoded):
    bad = write_jsonl("in/bad.jsonl", ["{"])
    for overwrite, read in ((False, [0, 1]), (True, [0, 1]), (True, [])):
        with pytest.raises(ConfigError, match="bad.jsonl:1: broken JSON"):
            update([*sources[:2], bad], overwrite=overwrite)
        assert encoded == [*(sources[i].name for i in read), "bad.jsonl"]
        encoded.clear()


def test_a_folder_in_use_is_refused_and_dead_runs_leave_nothing(update, sources, tmp_path):
    prefix = tmp_path / "x" / "x"
    with DatasetFolder(prefix).held():
        for options in ({}, dict(task=Task(0, 2))):
            with pytest.raises(ConfigError, match=rf"x is in use by another run \(process {os.getpid()} on .*wait for"):
                update(sources, **options)
    assert not prefix.parent.exists()
    with DatasetFolder(prefix, Task(1, 2)).held():
        with pytest.raises(ConfigError, match="x is in use by another run; wait"):
            update(sources)
        with pytest.raises(ConfigError, match=r"x, --shard 1/2, is in use by another run \(process"):
            update(sources, task=Task(1, 2))
        assert update(sources, task=Task(0, 2)) is None
    dead = Path(f"{prefix}.shards", "partial-7-of-9")
    dead.mkdir()
    (dead / "bin").write_bytes(b"half")
    update(sources)
    update(sources, "fresh")
    assert files_of(prefix) == files_of(tmp_path / "fresh" / "x")


def test_the_lock_of_a_killed_run_is_free(update, sources, tmp_path):
    context = multiprocessing.get_context("spawn")
    parent, child = context.Pipe()
    holder = context.Process(target=_hold_until_killed, args=(tmp_path / "x" / "x", child))
    holder.start()
    parent.recv()
    with pytest.raises(ConfigError, match=rf"in use by another run \(process {holder.pid} "):
        update(sources)
    holder.kill()
    holder.join()
    assert update(sources).changes.added == ["a.jsonl", "b.jsonl", "c.jsonl"]


def _hold_until_killed(prefix, pipe):
    with DatasetFolder(prefix).held():
        pipe.send("held")
        pipe.recv()


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_tasks_in_any_order_give_the_bytes_of_one_run(update, sources, tmp_path, order):
    reports = [update(sources, task=Task(number, 3), workers=1) for number in order]
    assert [report is None for report in reports] == [True, True, False]
    update(sources, "alone")
    assert files_of(tmp_path / "x" / "x") == files_of(tmp_path / "alone" / "x")


def test_the_last_task_says_what_became_of_each_source(update, sources, write_jsonl, tmp_path):
    update(sources)
    os.utime(sources[0], ns=(1, 1))
    write_jsonl("in/b.jsonl", rows("other", 9))
    damaged = json.loads((tmp_path / "x" / "x.json").read_text())["sources"][2]["shard"]["name"]
    (tmp_path / "x" / "x.shards" / f"{damaged}.bin").unlink()
    paths = [*sources, write_jsonl("in/d.jsonl", rows("d", 3))]
    for number in range(3):
        report = update(paths, task=Task(number, 3))
    assert str(report.changes) == "sources: 1 kept, 1 added (d.jsonl), 1 changed (b.jsonl), 1 mended (c.jsonl)"


def test_tasks_compare_the_contents_of_their_own_share_once(update, sources, tmp_path, monkeypatch, encoded):
    update(sources)
    for path in sources:
        os.utime(path, ns=(1, 1))
    hashed, read = [], incremental.sha256_of
    monkeypatch.setattr(incremental, "sha256_of", lambda path, *stop: hashed.append(path.name) or read(path, *stop))
    encoded.clear()
    reports = [update(sources, task=Task(number, 3)) for number in (2, 0)]
    assert sorted(hashed) == sorted(given.name for number in (2, 0) for given in share_of(
        incremental.list_inputs(sources), Task(number, 3)))
    reports.append(update(sources, task=Task(1, 3)))
    assert sorted(hashed) == ["a.jsonl", "b.jsonl", "c.jsonl"] and not encoded
    assert reports[:2] == [None, None] and str(reports[2].changes) == "sources: 3 kept"


def test_where_all_rows_are_bad_they_are_told(update, write_jsonl, tmp_path):
    paths = [write_jsonl("in/a.jsonl", ["{", "["]), write_jsonl("in/b.jsonl", [dict(response="c"), "{"])]
    with pytest.raises(ConfigError) as refused:
        update(paths, skip_bad_rows=True)
    said = str(refused.value)
    assert f"no example to write; skipped 3: broken JSON, first {paths[0]}:1: " in said and "\n" not in said
    assert f"; skipped 1: missing field, first {paths[1]}:1: " in said and said.endswith("; check the input")


def test_a_merge_makes_nothing(update, sources, tmp_path, encoded):
    update(sources, task=Task(1, 3))
    first = files_of_shards(tmp_path / "x" / "x")
    with pytest.raises(ConfigError, match="2 of 3 sources have no shard in .*x.shards yet, the first .*out --merge"):
        update(sources, merge=True)
    assert files_of_shards(tmp_path / "x" / "x") == first
    with DatasetFolder(tmp_path / "x" / "x", Task(5, 9)).held():  # so that the last does not complete it
        update(sources, task=Task(0, 3))
        assert update(sources, task=Task(2, 3)) is None
    count = len(encoded)
    stamps = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "x" / "x.shards").glob("*.bin")}
    assert update(sources, merge=True).changes.added == ["a.jsonl", "b.jsonl", "c.jsonl"] and len(encoded) == count
    assert stamps == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "x" / "x.shards").glob("*.bin")}
    update(sources, "alone")
    assert files_of(tmp_path / "x" / "x") == files_of(tmp_path / "alone" / "x")


def files_of_shards(prefix):
    return {path.name for path in Path(f"{prefix}.shards").glob("[!.]*")}


@pytest.mark.parametrize("spelled", ["3/3", "a/b", "1", "-1/2", "1/0", "1/2/3"])
def test_a_share_that_is_none_is_refused(spelled):
    with pytest.raises(ConfigError, match=f"--shard {spelled}: give a task and their number"):
        Task.of(spelled)


def test_shares_are_even_and_cover_all():
    assert Task.of("2/16") == Task(2, 16)
    inputs = [Input(str(size), Path(str(size)), size, 0) for size in (10, 1, 70, 30, 40, 0, 50, 20)]
    shares = [share_of(inputs, Task(number, 3)) for number in range(3)]
    assert sorted(given.name for share in shares for given in share) == sorted(given.name for given in inputs)
    assert max(sum(given.num_bytes for given in share) for share in shares) <= 80  # of 221


def test_names_are_paths_below_the_input(write_jsonl, tmp_path, monkeypatch):
    for name in ("in/a/x.jsonl", "in/y.jsonl", "other/z.jsonl", "more/deep/w.jsonl"):
        write_jsonl(name, rows("a", 1))
    monkeypatch.chdir(tmp_path)
    paths = [Path("in/a/x.jsonl"), Path("in/y.jsonl"), Path("other/z.jsonl"), Path("more/deep/w.jsonl")]
    assert source_names(["in", "other/z.jsonl", "more/*/*.jsonl"], paths) == [
        "a__x.jsonl", "y.jsonl", "z.jsonl", "deep__w.jsonl"]


def test_two_sources_of_one_name_are_refused(write_jsonl, tmp_path, tokenizer, tool, capsys):
    one, two = (write_jsonl(name, rows("a", 1)) for name in ("in/one/x.jsonl", "in/two/x.jsonl"))
    write_jsonl("in/one__x.jsonl", rows("b", 1))
    flags = ["--output-prefix", str(tmp_path / "out" / "x"), "--tokenizer-model", str(tokenizer.path)]
    for inputs, names in (([one, two], (one, two, "x.jsonl")), ([tmp_path / "in"], ("one__x.jsonl", one))):
        assert tool("preprocess_data")(["--input", *map(str, inputs), *flags]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and "would both be called" in error
        assert all(str(name) in error for name in names) and "give --input the folder" in error
    assert not (tmp_path / "out").exists()
    assert tool("preprocess_data")(["--input", str(tmp_path / "in" / "one"), str(two), *flags]) == 1


def test_what_lint_has_found_is_kept_with_its_source(update, write_jsonl, encoded, tmp_path):
    odd = write_jsonl("in/odd.jsonl", [dict(condition="", instruction="what is \ufffd?", response="this"),
                                       dict(condition="", instruction="and that?", response="and that?")])
    paths = [write_jsonl("in/a.jsonl", rows("a", 3)), odd]
    update(paths, lint="off")
    assert not any("lint" in line for line in update(paths, lint="off").lines()) and len(encoded) == 2
    lines = update(paths).lines()  # nobody has looked yet
    assert len(encoded) == 4 and [line.split(".")[0] for line in lines if "U+FFFD" in line or "equal" in line]
    assert update(paths).lines() == lines and len(encoded) == 4
    before = files_of(tmp_path / "x" / "x")
    with pytest.raises(ConfigError, match="lint: 1 texts with U.*odd.jsonl:1 .*--lint warn writes them"):
        update(paths, lint="error")
    assert files_of(tmp_path / "x" / "x") == before and len(encoded) == 4
    assert str(update(paths[:1], lint="error").changes) == "sources: 1 kept, 1 removed (odd.jsonl)"
