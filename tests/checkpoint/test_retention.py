"""An older iteration goes only when a newer one is whole; nothing else in the folder ever goes."""
from __future__ import annotations

import errno
import re
import shutil
import threading

import pytest

from hrm_megatron.checkpoint.folders import complete_iterations
from hrm_megatron.checkpoint.manifest import MANIFEST_FILE, describe_folder, write_manifest
from hrm_megatron.checkpoint.retention import bytes_of_deleted, delete, expendable, finish_deletion
from tests.checkpoint.conftest import add_iteration


@pytest.fixture
def save(tmp_path):
    """Iterations 0, 3, 6, 9, 12, and what else may stand beside them."""
    for number in range(0, 15, 3):
        add_iteration(tmp_path, number)
    for name in ("release", "iter_0000003_ema", "iter_0000006_hf", "logs"):
        shutil.copytree(tmp_path / "iter_0000003", tmp_path / name)
    return tmp_path


def gone(save, latest, keep, interval=None, protected=()):
    return expendable(save, latest, keep, interval, protected)


def test_the_last_ones_stay(save):
    assert gone(save, 12, 1) == [3, 6, 9] and gone(save, 12, 2) == [3, 6] and gone(save, 12, 9) == []
    assert gone(save, 12, 1, interval=6) == [3, 9]
    assert gone(save, 12, 1, protected=[3]) == [6, 9]


def test_nothing_goes_before_the_newer_one_is_whole(save):
    add_iteration(save, 15, manifest=False)  # as in a save whose tracker is written already
    assert complete_iterations(save)[-1] == "iter_0000015" and gone(save, 15, 1) == []
    write_manifest(save / "iter_0000015", 15, {}, describe_folder(save / "iter_0000015"))
    assert gone(save, 15, 1) == [3, 6, 9, 12]
    (save / "iter_0000015" / "common.pt").write_text("{")  # shorter than its manifest says
    assert gone(save, 15, 1) == []


def test_what_is_damaged_counts_as_no_copy(save):
    (save / "iter_0000009" / MANIFEST_FILE).write_text("{")
    assert gone(save, 12, 2) == [3]
    (save / "iter_0000006" / "common.pt").unlink()
    assert gone(save, 12, 2) == []


def test_links_and_iterations_of_a_later_step_stay(save, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    (save / "iter_0000003").rename(elsewhere)
    (save / "iter_0000003").symlink_to(elsewhere)
    assert gone(save, 9, 1) == [6]


def test_a_deletion_that_was_cut_short_is_finished_and_nothing_looks_whole_meanwhile(save, monkeypatch, caplog):
    removed, before = shutil.rmtree, {path.name for path in save.iterdir()}

    def fail(folder):
        if "3" in folder.name:
            raise OSError(errno.EBUSY, "busy")
        removed(folder)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", fail)
        delete(save, [3, 6])
        assert complete_iterations(save) == [f"iter_{number:07d}" for number in (0, 9, 12)]
        finish_deletion(save)
    assert re.search(r"cannot delete \S+iter_0000003.deleted \(.*busy\); the next save tries again", caplog.text)
    left = save / ".iter_0000003.deleted"
    assert [*save.glob(".iter_*")] == [left]
    assert bytes_of_deleted(save) == sum(path.stat().st_size for path in left.iterdir())
    delete(save, [9])
    finish_deletion(save)
    assert before - {path.name for path in save.iterdir()} == {f"iter_{number:07d}" for number in (3, 6, 9)}
    assert {path.name for path in save.iterdir()} <= before and not bytes_of_deleted(save)


def test_a_step_does_not_wait_for_the_files_but_the_next_save_does(save, monkeypatch):
    removed, may_remove = shutil.rmtree, threading.Event()

    def wait(folder):
        assert may_remove.wait(60)
        removed(folder)
    monkeypatch.setattr(shutil, "rmtree", wait)
    delete(save, [3])
    assert complete_iterations(save) == [f"iter_{number:07d}" for number in (0, 6, 9, 12)]
    assert [path.name for path in save.glob(".iter_*")] == [".iter_0000003.deleted"]
    may_remove.set()
    finish_deletion(save)
    assert not [*save.glob(".iter_*")]
