"""However a rank dies while it saves in the background and deletes what is older, a good checkpoint is there."""
from __future__ import annotations

import pytest

from hrm_megatron.checkpoint.folders import complete_iterations, find_iteration
from hrm_megatron.checkpoint.verify import verify
from tests.training.killed_saves import LOST, newest_whole
from tests.training.test_resume import IN_BACKGROUND, tensors_that_differ

# Where a rank dies, at which iteration, and which is the newest whole one then.
DEATHS = [("in the background", 6, 3), ("before the manifest", 6, 3), ("before the deletion", 9, 9),
          ("between renaming and deletion", 12, 12), ("in the deletion", 15, 15)]
PRELUDE = """
import os
from pathlib import Path
from tests.training.killed_saves import install
install({moment!r}, {iteration}, Path({save!r}), int(os.environ["RANK"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("keep", [1, 2])
def test_a_good_checkpoint_is_there_at_all_times(launch, fullbatch_arguments, native_start, tmp_path, survived, keep):
    save = tmp_path / "killed"
    flags = [*fullbatch_arguments, "--train-iters", 18, "--save-interval", 3, "--most-recent-k", keep, *IN_BACKGROUND]

    def start(moment, iteration, load):
        return launch(*flags, "--load", load, "--save", save, ranks=2, grace_seconds=0,
                      prelude=PRELUDE.format(moment=moment, iteration=iteration, save=str(save)))
    for moment, iteration, newest in DEATHS:
        run = start(moment, iteration, save if save.exists() else native_start)
        assert run.code == -9, run.output[-3000:]
        assert newest_whole(save) == newest
        assert verify(save / f"iter_{newest:07d}")
        survived(f"kill -9, {keep} kept: {moment}", "DP 2, --async-save")
    assert start("never", 0, save).code == 0
    # The one without a manifest is given one by the start that goes on from it, and goes as the others do.
    assert complete_iterations(save) == [f"iter_{number:07d}" for number in range(18 - 3 * (keep - 1), 19, 3)]
    assert not list(save.glob(".iter_*"))
    undisturbed = launch(*flags, "--load", native_start, "--save", tmp_path / "undisturbed", ranks=2)
    assert undisturbed.code == 0, undisturbed.output[-3000:]
    assert not tensors_that_differ(find_iteration(save), find_iteration(tmp_path / "undisturbed"))


@pytest.mark.slow
def test_a_deletion_that_goes_too_far_would_be_seen(launch, fullbatch_arguments, native_start, tmp_path):
    too_far = """
from hrm_megatron.training import early_stopping
early_stopping.expendable = lambda save, latest, *_: [latest]
"""
    run = launch(*fullbatch_arguments, "--load", native_start, "--save", tmp_path / "run", "--save-interval", 3,
                 "--most-recent-k", 1, prelude=too_far + PRELUDE.format(moment="never", iteration=0,
                                                                        save=str(tmp_path / "run")))
    assert run.code == LOST and "iteration -1 is the newest whole one, it was 3" in run.output, run.output[-3000:]
