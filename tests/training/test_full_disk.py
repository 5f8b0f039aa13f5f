"""A disk that fills up behind a run: files that it needs end it in one line, curves do not."""
import errno

import pytest

from hrm_megatron.config import ConfigError
from hrm_megatron.training.error_file import outcome
from hrm_megatron.training.run_files import unwritten
from tests.training.test_bad_steps import poison
from tests.training.test_last_evaluation import train  # noqa: F401  # a fixture
from tests.training.test_validation import store  # noqa: F401  # a fixture

FULL = """
import errno
from pathlib import Path
from hrm_megatron import program
writing = program.whole_file
def whole_file(path):
    if path.name == "{file}":
        raise OSError(errno.ENOSPC, "No space left on device", str(path))
    return writing(path)
program.whole_file = whole_file
"""


@pytest.mark.parametrize("file, flags, prelude", [
    ("early_stopping.json", ["--early-stopping", 1], ""),
    ("bad_steps.json", ["--on-nonfinite", "rollback", "--rollback-after", 1], poison(2))])
def test_all_ranks_say_which_file_cannot_be_written(train, tmp_path, file, flags, prelude):  # noqa: F811
    run = train(tmp_path, *flags, ranks=2, prelude=prelude + FULL.format(file=file))
    line = f"error: --save {tmp_path}: cannot write {file} (No space left on device); mend that and start again"
    assert run.code == 2 and run.errors == [line] and line in run.last_output.splitlines(), run.output[-3000:]


@pytest.mark.parametrize("number, ends", [(errno.ENOSPC, "refused"), (errno.EROFS, "refused"), (errno.EIO, "failed")])
def test_a_launcher_starts_again_behind_what_may_pass(tmp_path, number, ends):
    error = unwritten(str(tmp_path), "a", OSError(number, "why"))
    assert isinstance(error, ConfigError) and outcome(error) == ends
    assert str(error) == f"--save {tmp_path}: cannot write a (why); mend that and start again"


NO_CURVES = """
import errno
from tensorboard.summary.writer.record_writer import RecordWriter
stock, written = RecordWriter.write, []
def write(self, data):
    written.append(0)
    if len(written) > 9:
        raise OSError(errno.ENOSPC, "No space left on device")
    return stock(self, data)
RecordWriter.write = write
"""


def test_a_run_without_room_for_what_it_can_do_without_goes_on(train, tmp_path):  # noqa: F811
    log = tmp_path / "log"
    run = train(tmp_path / "saved", "--tensorboard-dir", log, prelude=NO_CURVES + FULL.format(file="evaluated.json"))
    assert run.code == 0 and (tmp_path / "saved" / "iter_0000004").is_dir(), run.output[-3000:]
    assert [line for line in run.output.splitlines() if "no more curves" in line] == [
        f"warning: --tensorboard-dir {log}: no more curves there (No space left on device)"]
    assert "Traceback" not in run.output and "Exception in thread" not in run.output
    assert f"--save {tmp_path / 'saved'}: cannot write evaluated.json (No space left on device); the same" in run.output
