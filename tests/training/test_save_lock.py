"""A --save folder has one run at a time, and a run that is gone holds nothing."""
import argparse
import contextlib
import errno
import logging
import os

import pytest

from hrm_megatron.checkpoint.manifest import TRACKER_FILE
from hrm_megatron.config import ConfigError
from hrm_megatron.data import folder_lock
from hrm_megatron.training.error_file import RestartableError
from hrm_megatron.training.save_lock import LEASE_SECONDS, LOCK_FILE, WAIT_SECONDS, SaveLock


def of_run(save, rank=0, skip_train=False):
    return argparse.Namespace(save=str(save), rank=rank, skip_train=skip_train, world_size=2)


def no_wait(seconds):
    raise AssertionError("waits")


def test_the_second_run_is_refused_until_the_first_has_ended(tmp_path):
    with SaveLock(no_wait) as first, SaveLock(no_wait) as second:
        first.hold(of_run(tmp_path))
        first.hold(of_run(tmp_path), make=True)
        with pytest.raises(ConfigError, match=rf"in use by another run \(process {os.getpid()} on"):
            second.hold(of_run(tmp_path))
    with SaveLock(no_wait) as third:
        third.hold(of_run(tmp_path))


def test_a_folder_is_made_only_when_the_run_begins(tmp_path):
    with SaveLock() as saves:
        saves.hold(of_run(tmp_path / "new"))
        assert not (tmp_path / "new").exists()
        saves.hold(of_run(tmp_path / "new"), make=True)
        assert (tmp_path / "new" / LOCK_FILE).is_file()


@pytest.mark.parametrize("idle", [dict(rank=1), dict(skip_train=True)])
def test_who_does_not_save_holds_nothing(tmp_path, idle):
    with SaveLock() as saves:
        saves.hold(of_run(tmp_path, **idle), make=True)
    assert not list(tmp_path.iterdir())


def test_a_killed_run_holds_nothing_though_its_workers_live(tmp_path):
    """A worker that was forked lives until the test ends, its parent does not."""
    stop_read, stop = os.pipe()
    forked, told = os.pipe()
    if not (parent := os.fork()):
        SaveLock().hold(of_run(tmp_path))
        if not os.fork():
            os.close(stop)
            os.write(told, b"1")
            os.read(stop_read, 1)  # returns when the test closes its end
            os._exit(0)
        os._exit(0)
    os.waitpid(parent, 0)
    assert os.read(forked, 1) == b"1"
    with SaveLock(no_wait) as saves:
        saves.hold(of_run(tmp_path))
    for file in (stop_read, stop, forked, told):
        os.close(file)


@pytest.mark.parametrize("gives_back", [True, False])
def test_what_a_dead_machine_held_is_waited_for(tmp_path, gives_back, caplog):
    path = tmp_path / LOCK_FILE
    file = os.open(path, os.O_RDWR | os.O_CREAT)
    folder_lock.locked_in_place(file, path)
    os.write(file, b"process 7 on another-machine since noon")
    waits = []

    def wait(seconds):
        waits.append(seconds)
        if gives_back and len(waits) == 3:
            os.close(file)
    with caplog.at_level(logging.INFO), SaveLock(wait) as saves:
        if gives_back:
            saves.hold(of_run(tmp_path))
            assert waits == [WAIT_SECONDS] * 3
        else:
            with pytest.raises(ConfigError, match="process 7 on another-machine since noon"):
                saves.hold(of_run(tmp_path))
            assert sum(waits) == LEASE_SECONDS
            os.close(file)
    assert len(caplog.messages) == 1 and "or its machine has died" in caplog.messages[0]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_that_is_saved_while_rank_0_waits_is_seen_by_it_alone(tmp_path, ranks):
    """Ranks that did not wait may go on from the step before."""
    (tmp_path / TRACKER_FILE).write_text("4")
    file = os.open(tmp_path / LOCK_FILE, os.O_RDWR | os.O_CREAT)
    folder_lock.locked_in_place(file, tmp_path / LOCK_FILE)
    os.write(file, b"process 7 on another-machine since noon")

    def wait(seconds):
        (tmp_path / TRACKER_FILE).write_text("6")
        os.close(file)
    args = of_run(tmp_path)
    args.world_size = ranks
    refused = pytest.raises(RestartableError, match="has saved another step while this one waited; start it again")
    with SaveLock(wait) as saves, refused if ranks > 1 else contextlib.nullcontext():
        saves.hold(args)


def test_a_tracker_file_with_any_content_is_left_to_who_reads_it(tmp_path):
    tracker = tmp_path / TRACKER_FILE
    for content in (b"\xb4", b"", None):
        tracker.unlink(missing_ok=True)
        tracker.mkdir() if content is None else tracker.write_bytes(content)
        with SaveLock(no_wait) as saves:
            saves.hold(of_run(tmp_path))


def test_without_locks_a_line_says_so(tmp_path, monkeypatch, caplog):
    def unsupported(file, operation):
        raise OSError(errno.EOPNOTSUPP, "no locks here")
    monkeypatch.setattr(folder_lock.fcntl, "flock", unsupported)
    with SaveLock() as saves:
        saves.hold(of_run(tmp_path))
    assert caplog.messages == [f"{tmp_path}: the file system has no locks (no locks here); see that no other run "
                               "writes there"]


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr("hrm_megatron.data.folder_lock.os.pwrite", full)
    with SaveLock() as saves, pytest.raises(ConfigError, match=r"cannot write to .* \(No space left on device\)"):
        saves.hold(of_run(tmp_path))
