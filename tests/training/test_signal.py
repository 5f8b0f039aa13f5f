"""A signal ends a run behind the step that runs: it saves, reports and exits with 0."""
from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from hrm_megatron.checkpoint.folders import TRACKER_FILE, complete_iterations
from hrm_megatron.checkpoint.retention import is_whole

STEP = 3
ENDED_IN_ITS_STEP = f"""
import os, signal
from hrm_megatron.training.step import TrainingStep

forward = TrainingStep.forward

def forwards(self, *arguments):
    if os.environ["RANK"] == "1" and self.running_step() == {STEP}:
        os.kill(os.getpid(), signal.SIGTERM)
    return forward(self, *arguments)
TrainingStep.forward = forwards
"""


def test_ranks_ask_for_the_signal_of_any_by_one_number(single_rank, monkeypatch):
    from hrm_megatron.training.exit_signal import received_by_any

    read, stock = [], torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "item", lambda tensor: read.append(tensor) or stock(tensor))
    assert [received_by_any(SimpleNamespace(_signal_received=signal)) for signal in (False, True)] == [[False], [True]]
    assert len(read) == 2


@pytest.mark.survives("SIGTERM to a rank", "DP 2")
def test_a_signal_saves_behind_the_step_and_reports(launch, fullbatch_arguments, tmp_path):
    save, report = tmp_path / "run", tmp_path / "report.html"
    run = launch(*fullbatch_arguments, "--save", save, "--save-interval", 12, "--tensorboard-dir", save,
                 "--run-report", report, "--exit-signal-handler", ranks=2, prelude=ENDED_IN_ITS_STEP)
    assert run.code == 0, run.output[-3000:]
    assert complete_iterations(save) == [f"iter_{STEP:07d}"] and is_whole(save / f"iter_{STEP:07d}")
    assert (save / TRACKER_FILE).read_text() == str(STEP)
    assert re.search(rf"<t[dh]>last step</t[dh]><td>{STEP} of 24</td>", report.read_text())
