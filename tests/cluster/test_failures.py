"""One summary of what many ranks left: the first cause on top, whatever was written first."""
from __future__ import annotations

import argparse
import json
import os

import pytest
import torch

from hrm_megatron.cluster.failures import (
    FAILED,
    REFUSED,
    WENT_BACK,
    first_cause,
    read_failures,
    summarize,
    write_refusal,
)
from hrm_megatron.config import ConfigError
from hrm_megatron.parallel.cpu import activate


def leave(logs, node, rank, text, seconds):
    """Write what torchrun's error handler writes, at a time."""
    path = logs / node / "4_x" / "attempt_0" / str(rank) / "error.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(dict(message=dict(message=text.splitlines()[-1], extraInfo=dict(py_callstack=text)))))
    os.utime(path, (seconds, seconds))


def test_the_first_cause_is_on_top(tmp_path):
    leave(tmp_path, "n1", 0, "Traceback\nRuntimeError: Connection closed by peer [10.0.0.2]", 99)
    leave(tmp_path, "n2", 1, "Traceback\n  in step\nZeroDivisionError: division by zero", 100)
    leave(tmp_path, "n1", 1, "Traceback\nValueError: later", 102)
    lines = summarize(read_failures(tmp_path), 1, tmp_path).splitlines()
    assert lines[0] == "first failure: node n2, local rank 1"
    assert lines[1:4] == ["Traceback", "  in step", "ZeroDivisionError: division by zero"]
    assert lines[4] == "then node n1, local rank 1: ValueError: later"
    assert lines[5].startswith("then node n1, local rank 0: RuntimeError: Connection closed")


def test_a_killed_rank_is_not_taken_for_the_one_that_lost_it(tmp_path):
    leave(tmp_path, "n1", 0, "Traceback\nRuntimeError: Connection closed by peer [10.0.0.2]", 99)
    assert summarize(read_failures(tmp_path), 1, tmp_path).startswith("every trace is of a rank that lost another one")


def test_a_launcher_that_starts_no_rank_is_not_taken_for_a_rank_that_was_killed(tmp_path):
    log = tmp_path / "n1" / "4_x" / "attempt_0" / "0" / "stdout.log"
    log.parent.mkdir(parents=True)
    log.touch()
    said = "the launcher failed, or ranks were killed before they said anything; see the log of the job\n"
    assert said in summarize([], 137, tmp_path)
    log.write_text("step 1")
    assert "no rank left a trace: it was killed" in summarize([], 137, tmp_path)


def test_what_a_launcher_refuses_is_told_from_what_fails(tmp_path):
    leave(tmp_path, "n1", 0, "Traceback\nRuntimeError: Connection closed by peer [10.0.0.2]", 99)
    write_refusal(tmp_path / "n2", "no files")
    failures = read_failures(tmp_path)
    assert first_cause(failures, 1) == (REFUSED, "no files")
    assert summarize(failures, 1, tmp_path).startswith("first failure: node n2\nerror: no files\n")


def test_what_training_writes_is_understood(tmp_path, monkeypatch):
    """Refused is what it would refuse again; memory may suffice on another node."""
    activate()
    from hrm_megatron.training.bad_steps import MOST_RETURNS, go_back
    from hrm_megatron.training.error_file import OneLineErrors
    from hrm_megatron.training.watchdog import HangError

    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    monkeypatch.setattr("torch.distributed.barrier", lambda: None)
    monkeypatch.setattr("torch.distributed.broadcast_object_list", lambda *_: None)
    args = argparse.Namespace(save=tmp_path / "run", iteration=6)

    def went_back():
        with pytest.raises(ConfigError) as ended:
            go_back(args, [7, 8], "gradients are not finite")
        return ended.value

    back = "steps 7, 8: gradients are not finite, 2 in a row"
    for number, (error, outcome, why) in enumerate([
            (ConfigError("--lr -1: must be positive"), REFUSED, "--lr -1: must be positive"),
            (torch.OutOfMemoryError("CUDA out of memory."), FAILED, "error: rank 0: CUDA out of memory."),
            (HangError("hang: rank 3"), FAILED, "error: hang: rank 3"),
            (ZeroDivisionError("by zero"), FAILED, "ZeroDivisionError: by zero"),
            *[(went_back(), WENT_BACK, back) for _ in range(MOST_RETURNS)], (went_back(), REFUSED, back)]):
        file = tmp_path / str(number) / "n1" / "0" / "error.json"
        file.parent.mkdir(parents=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(file))
        try:
            raise error
        except Exception as raised:
            OneLineErrors(0).record_exception(raised)
        found = first_cause(read_failures(file.parents[2]), 1)
        assert found[0] == outcome and found[1].startswith(why), found
    assert first_cause([], 137) == (FAILED, "exit code 137, no trace")


def test_a_damaged_error_file_is_said(tmp_path):
    leave(tmp_path, "n1", 0, "x", 1)
    (tmp_path / "n1" / "4_x" / "attempt_0" / "0" / "error.json").write_text("{")
    assert "damaged" in summarize(read_failures(tmp_path), 1, tmp_path)
