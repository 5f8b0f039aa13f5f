"""One summary of what many ranks left: the first cause on top, whatever was written first."""
from __future__ import annotations

import json
import os

from hrm_megatron.cluster.failures import read_failures, refusal, summarize


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
    lines = summarize(read_failures(tmp_path), 1).splitlines()
    assert lines[0] == "first failure: node n2, local rank 1"
    assert lines[1:4] == ["Traceback", "  in step", "ZeroDivisionError: division by zero"]
    assert lines[4] == "then node n1, local rank 1: ValueError: later"
    assert lines[5].startswith("then node n1, local rank 0: RuntimeError: Connection closed")


def test_a_killed_rank_is_not_taken_for_the_one_that_lost_it(tmp_path):
    leave(tmp_path, "n1", 0, "Traceback\nRuntimeError: Connection closed by peer [10.0.0.2]", 99)
    assert summarize(read_failures(tmp_path), 1).startswith("every trace is of a rank that lost another one")
    assert "no rank left a trace" in summarize([], 137)


def test_a_refused_input_is_told_from_a_failure(tmp_path):
    leave(tmp_path, "n1", 0, "error: --lr -1: must be positive", 99)
    assert refusal(read_failures(tmp_path)) == "--lr -1: must be positive"
    memory = tmp_path / "memory"
    leave(memory, "n1", 0, "error: rank 3: CUDA out of memory.", 99)  # may pass on another node
    assert refusal(read_failures(memory)) is None


def test_a_damaged_error_file_is_said(tmp_path):
    leave(tmp_path, "n1", 0, "x", 1)
    (tmp_path / "n1" / "4_x" / "attempt_0" / "0" / "error.json").write_text("{")
    assert "damaged" in summarize(read_failures(tmp_path), 1)
