"""`--ckpt-step N` within one folder: a run goes back once, and nothing that it saved behind N is lost."""
import argparse
import json
import shutil

import pytest

from hrm_megatron.checkpoint.folders import complete_iterations
from hrm_megatron.checkpoint.manifest import ABANDONED, TRACKER_FILE
from hrm_megatron.config import ConfigError
from hrm_megatron.monitoring.run_folder import RunFolder
from hrm_megatron.training import early_stopping, going_back
from hrm_megatron.training.checkpoint import check_start
from hrm_megatron.training.early_stopping import Record
from hrm_megatron.training.going_back import RECORD_FILE, go_back, step_to_go_back_to, way_back, went_back
from tests.checkpoint.conftest import add_iteration
from tests.training.conftest import scalars, written

AGAIN = "goes on from its newest iteration; remove "


def names(*steps):
    return [f"iter_{step:07d}" for step in steps]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def train(launch, fullbatch_arguments, tmp_path):
    def train(*flags, **options):
        return launch(*fullbatch_arguments, "--load", tmp_path / "run", "--save", tmp_path / "run", "--save-interval",
                      2, *flags, **options)
    return train


@pytest.fixture
def saved(train, tmp_path):
    """The folder of a run that has saved at steps 2, 4 and 6."""
    assert train("--exit-interval", 6).code == 0
    return tmp_path / "run"


def test_the_same_command_goes_back_once_and_then_goes_on(train, saved, tmp_path):
    abandoned = {name: contents(saved / name) for name in names(4, 6)}
    before = written(saved)
    told = train("--ckpt-step", 2, "--dry-run")
    size = sum(map(len, (one for files in abandoned.values() for one in files.values()))) / 1e9
    moved = f"what was saved behind it (iter_0000004 to iter_0000006: 2, {size:.3g} GB)"
    assert told.code == 0 and f"--ckpt-step 2: {moved} would be moved to {saved / ABANDONED}, and" in told.output
    assert written(saved) == before

    # Killed between two of its operations: what goes on is the same command, and no other takes what is left.
    killed = train("--ckpt-step", 2, prelude="""
import os, signal
from hrm_megatron.training import going_back
move, moved = going_back._move, []
def killing(*folders):
    if moved:
        os.kill(os.getpid(), signal.SIGKILL)
    moved.append(move(*folders))
going_back._move = killing
""")
    assert killed.code == -9 and complete_iterations(saved) == names(2, 6)
    other = train()
    assert other.code == 2 and "a start that went back to iteration 2 was interrupted; give --ckpt-step 2" in \
        other.errors[0]

    back = train("--ckpt-step", 2, "--exit-interval", 4, ranks=2)
    assert back.code == 0 and f" GB) was moved to {saved / ABANDONED}, and" in back.output, back.output
    assert "goes on after step 2," in back.output and complete_iterations(saved) == names(2, 4)
    assert {name: contents(saved / ABANDONED / name) for name in names(4, 6)} == abandoned

    assert AGAIN + str(saved / RECORD_FILE) in train("--ckpt-step", 2, "--dry-run").output
    again = train("--ckpt-step", 2, "--exit-interval", 8, "--most-recent-k", 2, "--tensorboard-dir", tmp_path / "log",
                  ranks=2)
    assert again.code == 0 and AGAIN in again.output and [*scalars(tmp_path / "log")] == [5, 6, 7, 8], again.output
    assert complete_iterations(saved) == names(6, 8)  # --most-recent-k bounds the folder
    assert {name: contents(saved / ABANDONED / name) for name in names(4, 6)} == abandoned
    assert [save.step for save in RunFolder.find(saved).saves()] == [6, 8]


def test_another_step_is_gone_back_to_and_who_removes_the_record_goes_back_again(saved, train):
    for step in (4, 2):
        assert train("--ckpt-step", step, "--exit-interval", 6).code == 0
    aside = [saved / f"{ABANDONED}{number}" for number in ("", ".2", ".3")]
    assert [complete_iterations(one) for one in aside[:2]] == [names(4, 6), names(6)] and not aside[2].exists()
    assert RunFolder.find(saved).saves()
    (saved / RECORD_FILE).unlink()
    back = train("--ckpt-step", 2, "--exit-interval", 4, "--async-save", "--use-persistent-ckpt-worker")
    assert back.code == 0 and "goes on after step 2," in back.output and complete_iterations(saved) == names(2, 4)
    assert [complete_iterations(one) for one in aside] == [names(4, 6), names(4, 6), names(6)]


def test_a_damaged_iteration_is_no_way_back_to_what_was_saved_behind_it(train, saved):
    damaged = next((saved / "iter_0000004").glob("*.distcp"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    before = written(saved)
    for flags in ([], ["--load-newest-valid"]):
        done = train("--ckpt-step", 4, *flags)
        assert done.code == 2 and done.errors[0].endswith("; the newest before it that verifies: --ckpt-step 2"), done
    assert complete_iterations(saved) == names(2, 4, 6) and {*written(saved)} >= {*before}
    assert not (saved / RECORD_FILE).exists() and not (saved / ABANDONED).exists()


class Killed(BaseException):
    pass


@pytest.fixture
def folder(tmp_path):
    """Iterations 2, 4, 6 and 8, the last of them a link, and what was measured at each."""
    save = tmp_path / "save"
    save.mkdir()
    for step in (2, 4, 6, 8):
        add_iteration(save, step)
    shutil.move(save / "iter_0000008", tmp_path / "elsewhere")
    (save / "iter_0000008").symlink_to("../elsewhere")
    (save / TRACKER_FILE).write_text("8")
    (save / RECORD_FILE).write_text('{"step": 6, "time": "before", "finished": true}')
    Record("raw", "digest", {2: 0.1, 4: 0.3, 6: 0.2, 8: 0.2}, 8).write(save)
    return save


def arguments(folder, **changes):
    return argparse.Namespace(**dict(
        load=str(folder), save=str(folder), ckpt_step=2, iteration=2, train_iters=12, early_stopping=None,
        finetune=False, skip_train=False, pretrained_checkpoint=None, load_newest_valid=False, dry_run=False,
        verify_checkpoint=True, verify_integrity=False, exit_on_missing_checkpoint=False) | changes)


OPERATIONS = [(going_back, "write_file"), (going_back, "_move"), (going_back, "write_aside"),
              (early_stopping, "write_file")]


@pytest.mark.parametrize("moment", range(9))
def test_a_kill_between_two_operations_is_mended_by_the_next_start(folder, monkeypatch, moment):
    """Record, tracker, three iterations, what was measured (kept aside, then forgotten), record; and one moment behind
    all."""
    done = []

    def counted(stock):
        def operation(*arguments):
            if len(done) == moment:
                raise Killed
            done.append(stock(*arguments))
        return operation
    args = arguments(folder)
    assert check_start(args) == folder / "iter_0000002"
    with monkeypatch.context() as patch:
        for place, name in OPERATIONS:
            patch.setattr(place, name, counted(getattr(place, name)))
        try:
            go_back(args, 2)
        except Killed:
            assert len(done) == moment < 8
        else:
            assert len(done) == moment == 8
    for newest in (False, True):  # without the flag: all as it was before, or all that is wanted
        without = arguments(folder, ckpt_step=None, load_newest_valid=newest)
        if 0 < moment < 8:
            with pytest.raises(ConfigError, match="went back to iteration 2 was interrupted; give --ckpt-step 2 to"):
                check_start(without)
        else:
            assert check_start(without).name == ("iter_0000002" if moment else "iter_0000008")
    if moment in (1, 2, 3):  # the step of the return before this one is one like any other
        earlier = arguments(folder, ckpt_step=6)
        assert check_start(earlier) == folder / "iter_0000006" and step_to_go_back_to(earlier) == 6
    if moment < 8:
        assert check_start(args) == folder / "iter_0000002" and not went_back(args)
        go_back(args, 2)
    assert complete_iterations(folder) == names(2) and (folder / TRACKER_FILE).read_text() == "2"
    assert complete_iterations(folder / ABANDONED) == names(4, 6, 8)
    assert (folder / ABANDONED / "iter_0000008").resolve() == folder.parent / "elsewhere"
    assert Record.load(folder / early_stopping.RECORD_FILE) == Record("raw", "digest", {2: 0.1})
    measured = Record.load(folder / ABANDONED / early_stopping.RECORD_FILE)
    assert measured.evaluations == {2: 0.1, 4: 0.3, 6: 0.2, 8: 0.2} and measured.stopped == 8
    add_iteration(folder, 4)
    (folder / TRACKER_FILE).write_text("4")
    assert AGAIN in went_back(args) and check_start(args) == folder / "iter_0000004"
    go_back(args, step_to_go_back_to(arguments(folder, ckpt_step=None)))
    assert complete_iterations(folder) == names(2, 4)


def test_a_start_at_the_newest_iteration_is_written_down_too(folder):
    """What it saves is its own: the next start does not leave that behind."""
    args = arguments(folder, ckpt_step=8, iteration=8)
    go_back(args, 8)
    assert complete_iterations(folder) == names(2, 4, 6, 8) and not (folder / ABANDONED).exists()
    assert json.loads((folder / RECORD_FILE).read_text())["step"] == 8 and went_back(args)


@pytest.mark.parametrize("changes", [
    dict(ckpt_step=None), dict(save=None), dict(save="other"), dict(finetune=True), dict(skip_train=True),
    dict(iteration=4), dict(train_iters=2)], ids=str)
def test_who_only_reads_or_begins_elsewhere_moves_nothing(folder, changes):
    """Nor does one that took another iteration in the place of a damaged one, or has no step to make."""
    before, args = written(folder), arguments(folder, **changes)
    go_back(args, step_to_go_back_to(args))
    assert written(folder) == before
    (folder / RECORD_FILE).write_text('{"step": 2, "time": "before", "finished": true}')
    assert bool(went_back(args)) == (changes.keys() <= {"iteration", "train_iters"})


def test_a_record_that_says_nothing_is_refused(folder):
    for content in ("{", "[]", "{}", '{"step": "two", "time": "", "finished": true}'):
        (folder / RECORD_FILE).write_text(content)
        with pytest.raises(ConfigError, match=f"{RECORD_FILE}: does not say which .*; remove it to go back once more"):
            check_start(arguments(folder))
    check_start(arguments(folder, skip_train=True))


def test_the_way_back_to_where_a_run_has_been_is_without_its_record(folder):
    assert way_back(arguments(folder, ckpt_step=None), 6) == f"--ckpt-step 6 without {folder / RECORD_FILE}"
    assert way_back(arguments(folder), 4) == way_back(arguments(folder, save=None), 4) == "--ckpt-step 4"


def test_a_folder_that_cannot_be_written_is_one_line(folder):
    (folder / ABANDONED).write_text("")  # in the way of the folder
    with pytest.raises(ConfigError, match=f"--save {folder}: cannot write what is behind iteration 2 into .*abandoned"):
        go_back(arguments(folder), 2)
