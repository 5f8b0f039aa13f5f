"""Which iteration of a folder is found, and in which order they were saved."""
from __future__ import annotations

import json
import shutil

import pytest

from hrm_megatron.checkpoint.archive import DamagedError
from hrm_megatron.checkpoint.folders import complete_iterations, find_iteration, last_saved_first
from hrm_megatron.checkpoint.iterations import folder_name, is_iteration, iteration_of
from hrm_megatron.checkpoint.manifest import MANIFEST_FILE, TRACKER_FILE
from hrm_megatron.checkpoint.retention import expendable
from tests.checkpoint.conftest import add_iteration


def test_names_are_read_as_they_are_made():
    for iteration in (0, 12, 9_999_999, 10_000_000):
        assert is_iteration(folder_name(iteration)) and iteration_of(folder_name(iteration)) == iteration
    for name in ("iter_12", "iter_0000003_ema", "release", "iter_", "xiter_0000003"):
        assert not is_iteration(name)
        with pytest.raises(ValueError, match=name):
            iteration_of(name)


def test_ten_million_come_behind_all_that_have_a_digit_less(tmp_path):
    for iteration in (9_999_000, 9_999_999, 10_000_000):
        add_iteration(tmp_path, iteration)
    assert complete_iterations(tmp_path) == ["iter_9999000", "iter_9999999", "iter_10000000"]
    assert expendable(tmp_path, 10_000_000, 1, None, ()) == [9_999_000, 9_999_999]


def test_without_a_manifest_it_was_saved_behind_all_that_are_below_it(tmp_path):
    add_iteration(tmp_path, 4)
    add_iteration(tmp_path, 2)  # by a run that went back, so later than 4
    assert last_saved_first(tmp_path) == ["iter_0000002", "iter_0000004"]
    add_iteration(tmp_path, 3, manifest=False)
    assert last_saved_first(tmp_path)[0] == "iter_0000003"


def test_a_tracker_is_refused_for_what_is_known_and_not_for_a_guess(tmp_path):
    add_iteration(tmp_path, 1)
    add_iteration(tmp_path, 2)
    (tmp_path / TRACKER_FILE).write_text("1")
    with pytest.raises(DamagedError, match="names iter_0000001, but iter_0000002 was saved after it"):
        find_iteration(tmp_path)
    (tmp_path / "iter_0000002" / MANIFEST_FILE).unlink()  # whether it came before or behind 1 is not known now
    assert find_iteration(tmp_path).name == "iter_0000001"


def test_a_tracker_is_refused_for_the_last_save_that_is_known(tmp_path):
    add_iteration(tmp_path, 1)
    add_iteration(tmp_path, 2)
    add_iteration(tmp_path, 3, manifest=False)
    (tmp_path / TRACKER_FILE).write_text("1")
    with pytest.raises(DamagedError, match="names iter_0000001, but iter_0000002 was saved after it"):
        find_iteration(tmp_path)
    (tmp_path / TRACKER_FILE).write_text("2")
    assert find_iteration(tmp_path).name == "iter_0000002"


def test_iteration_0_too_is_refused_a_tracker_that_passes_over_it(tmp_path):
    add_iteration(tmp_path, 1)
    add_iteration(tmp_path, 0)
    (tmp_path / TRACKER_FILE).write_text("1")
    with pytest.raises(DamagedError, match="names iter_0000001, but iter_0000000 was saved after it"):
        find_iteration(tmp_path)


@pytest.mark.parametrize("name", ["release", "iter_0000007"])
def test_a_run_whose_folder_is_called_like_an_iteration_is_a_run(tmp_path, name):
    add_iteration(tmp_path, 3)
    run = shutil.copytree(tmp_path, tmp_path / name)
    (run / TRACKER_FILE).write_text("3")
    assert find_iteration(run) == run / "iter_0000003"
    (run / TRACKER_FILE).unlink()
    for path in (tmp_path / "iter_0000003").iterdir():
        shutil.copy(path, run)
    assert find_iteration(run) == run and json.loads((run / MANIFEST_FILE).read_text())["iteration"] == 3
