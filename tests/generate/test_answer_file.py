"""An answer file is whole or not there, goes on where a run stopped, and never mixes two runs."""
import json

import pytest

from hrm_megatron.config import ConfigError
from hrm_megatron.generate.answer_file import AnswerFile

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


def test_a_stop_before_the_first_answer_leaves_nothing_to_trust(tmp_path):
    (tmp_path / "a.partial").write_text('{"response": "of nobody knows what"}\n')
    assert write(tmp_path / "a", RECORDS[:1]) == 0
    assert len((tmp_path / "a").read_text().splitlines()) == 1


def test_answers_of_other_settings_are_not_mixed(tmp_path):
    write(tmp_path / "a", RECORDS[:2], killed=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match=r"a.partial: was begun with seed=1, not 2; go on with that, choose another"):
        write(tmp_path / "a", RECORDS, {**SETTINGS, "seed": 2}, overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


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


def test_two_processes_do_not_write_one_file(tmp_path):
    with AnswerFile(tmp_path / "a", SETTINGS):
        with pytest.raises(ConfigError, match="another process is writing it"):
            write(tmp_path / "a", RECORDS)


def test_a_note_that_is_damaged_is_named(tmp_path):
    write(tmp_path / "a", RECORDS[:2], killed=True)
    (tmp_path / "a.partial.json").write_text("{")
    with pytest.raises(ConfigError, match=r"a.partial.json: not JSON .*; remove it and .*a.partial to begin again"):
        write(tmp_path / "a", RECORDS)
