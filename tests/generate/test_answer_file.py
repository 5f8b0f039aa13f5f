"""An answer file is whole or not there, goes on where a run stopped, and never mixes two runs."""
import errno
import fcntl
import json
import resource
from dataclasses import replace

import pytest

from hrm_megatron.config import ConfigError
from hrm_megatron.generate.answer_file import AnswerFile
from hrm_megatron.generate.questions import Question

RECORDS = [{"response": f"{i}\u2028"} for i in range(4)]
SETTINGS = {"seed": 1, "stop": (";",)}


class Killed(BaseException):
    pass


def write(path, records, settings=SETTINGS, killed=False, **options):
    """Write all records but those that are there; return how many were."""
    try:
        with AnswerFile(path, settings, **options) as file:
            for record in records[file.done:]:
                file.write(record)
            if killed:
                raise Killed
            file.finish()
    except Killed:
        pass
    return file.done


def test_a_file_appears_whole(tmp_path):
    path = tmp_path / "new" / "answers.jsonl"
    assert write(path, RECORDS[:2], killed=True) == 0
    assert not path.exists()
    assert write(path, RECORDS) == 2
    assert [json.loads(line) for line in path.read_text().splitlines()] == RECORDS
    assert [*path.parent.iterdir()] == [path]


@pytest.mark.parametrize("torn", [b"", b'{"resp', b'{"response": "7"}'], ids=["nothing", "half a line", "no line end"])
def test_a_torn_line_is_written_again(tmp_path, torn):
    write(tmp_path / "a", RECORDS[:3], killed=True)
    with open(tmp_path / "a.partial", "ab") as file:
        file.write(torn)
    assert write(tmp_path / "a", RECORDS) == 3
    assert [json.loads(line) for line in (tmp_path / "a").read_text().splitlines()] == RECORDS


def test_a_stop_before_the_first_answer_is_gone_on_with_in_any_settings(tmp_path):
    (tmp_path / "a.partial").touch()  # a stop before the note
    assert write(tmp_path / "a", RECORDS[:1]) == 0
    write(tmp_path / "b", [], {**SETTINGS, "seed": 2}, killed=True)  # and one behind it
    assert write(tmp_path / "b", RECORDS[:1]) == 0
    assert [len((tmp_path / name).read_text().splitlines()) for name in "ab"] == [1, 1]
    assert len([*tmp_path.iterdir()]) == 2


def test_a_partial_file_of_nobody_knows_what_is_kept(tmp_path):
    mine = tmp_path / "a.partial"
    mine.write_text("mine\n")
    with pytest.raises(ConfigError, match=r"a.partial: has no a.partial.json beside it that says what it was made"):
        write(tmp_path / "a", RECORDS)
    assert mine.read_text() == "mine\n" and [*tmp_path.iterdir()] == [mine]


def test_answers_of_other_settings_are_not_mixed(tmp_path):
    write(tmp_path / "a", RECORDS[:2], killed=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match=r"a.partial: was begun with seed=1, not 2; go on with that, choose another"):
        write(tmp_path / "a", RECORDS, {**SETTINGS, "seed": 2}, overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("change, difference", [
    (lambda asked: [asked[0], replace(asked[1], instruction="What?"), *asked[2:]],
     "rows.jsonl:2 is not what its line 2 answers"),
    (lambda asked: [replace(asked[0], others={"id": True}), *asked[1:]], "rows.jsonl:1 is not what its line 1 answers"),
    (lambda asked: [asked[1], asked[0], *asked[2:]], "rows.jsonl:2 is not what its line 1 answers"),
    (lambda asked: asked + asked[:1], "4 of them, not 5"), (lambda asked: asked[:1], "4 of them, not 1"),
    (lambda asked: [*asked[:3], replace(asked[3], condition="cot")], "of which the first 2 are the same"),
])
def test_other_questions_are_refused_by_the_first_that_differs(tmp_path, change, difference):
    asked = [Question(f"rows.jsonl:{number}", "direct", f"{number}?", {"id": number}) for number in range(1, 5)]
    records = [each.fields | record for each, record in zip(asked, RECORDS, strict=True)]
    write(tmp_path / "a", records[:2], killed=True, questions=asked)
    with open(tmp_path / "a.partial", "ab") as file:
        file.write(b'{"half a line')
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError) as refused:
        write(tmp_path / "a", records, questions=change(asked))
    assert str(refused.value) == (
        f"{tmp_path}/a.partial: was begun with other questions ({difference}); give the former ones (--input, "
        "--prompt-file or --prompt), choose another --output, or remove it and a.partial.json")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert write(tmp_path / "a", records, questions=asked) == 2


def test_the_same_weights_under_another_name_are_gone_on_with(tmp_path):
    weights = dict(SETTINGS, fingerprint="a", weights="raw", iteration=0)
    write(tmp_path / "a", RECORDS[:2], weights, killed=True)
    with pytest.raises(ConfigError, match="was begun with fingerprint='a', not 'b'"):
        write(tmp_path / "a", RECORDS, weights | dict(fingerprint="b"))
    with pytest.raises(ConfigError, match="was begun with seed=1, not 2"):
        write(tmp_path / "a", RECORDS, weights | dict(weights="ema", seed=2))
    assert write(tmp_path / "a", RECORDS, weights | dict(weights="ema", iteration=7)) == 2


def test_an_existing_file_is_replaced_only_when_told_and_whole(tmp_path):
    path = tmp_path / "a"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="--output .*a: exists; choose another, or pass --overwrite"):
        write(path, RECORDS)
    write(path, RECORDS, killed=True, overwrite=True)
    assert path.read_text() == "mine"
    assert write(path, RECORDS, overwrite=True) == 4
    assert len(path.read_text().splitlines()) == 4
    with pytest.raises(ConfigError, match="exists; choose another$"):
        write(tmp_path, RECORDS, overwrite=True)


def test_a_link_stays_and_so_does_the_mode_of_what_it_leads_to(tmp_path):
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "a", tmp_path / "link"
    target.write_text("mine")
    target.chmod(0o600)
    link.symlink_to(target)
    write(link, RECORDS, overwrite=True)
    assert link.is_symlink() and len(target.read_text().splitlines()) == 4
    assert target.stat().st_mode & 0o777 == 0o600
    assert [*(tmp_path / "real").iterdir()] == [target]


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "flock", flock)
    assert write(tmp_path / "a", RECORDS) == 0 and len((tmp_path / "a").read_text().splitlines()) == 4
    assert caplog.messages == [f"{tmp_path}: the file system has no locks (No locks available); see that no other run "
                               "writes there"]


def test_a_full_disk_is_told_by_the_name_of_the_file_and_loses_no_answer(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    write(tmp_path / "a", RECORDS[:1], killed=True)
    full = (tmp_path / "a.partial").stat().st_size + 5  # in the middle of the next line
    resource.setrlimit(resource.RLIMIT_FSIZE, (full, limits[1]))
    try:
        with pytest.raises(OSError) as raised:
            write(tmp_path / "a", RECORDS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert raised.value.filename == str(tmp_path / "a.partial")
    assert write(tmp_path / "a", RECORDS) == 1
    assert [json.loads(line) for line in (tmp_path / "a").read_text().splitlines()] == RECORDS


def test_two_processes_do_not_write_one_file(tmp_path):
    with AnswerFile(tmp_path / "a", SETTINGS):
        with pytest.raises(ConfigError, match="another process is writing it"):
            write(tmp_path / "a", RECORDS)


def test_a_note_that_is_damaged_is_named(tmp_path):
    write(tmp_path / "a", RECORDS[:2], killed=True)
    (tmp_path / "a.partial.json").write_text("{")
    with pytest.raises(ConfigError, match=r"a.partial.json: not JSON .*; remove it and .*a.partial to begin again"):
        write(tmp_path / "a", RECORDS)
