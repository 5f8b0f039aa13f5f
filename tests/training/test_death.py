"""A rank that dies takes the run with it, soon, and its name is told."""
import os
import re
import signal
import subprocess
import sys
import time

import pytest

SECONDS_TO_START, SECONDS_TO_STOP = 150, 120


@pytest.mark.slow
def test_the_others_stop_and_the_dead_rank_is_named(fullbatch_arguments, tmp_path):
    log = tmp_path / "log"
    with log.open("w") as file:
        run = subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
             "hrm_megatron.pretrain", *map(str, fullbatch_arguments), "--train-iters", "100000"],
            stdout=file, stderr=file)
        try:
            deadline = time.monotonic() + SECONDS_TO_START
            while "step " not in log.read_text():
                assert run.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
                time.sleep(0.2)
            ranks = {rank_of(pid): pid for pid in children(run.pid)}
            os.kill(ranks["1"], signal.SIGKILL)
            assert run.wait(timeout=SECONDS_TO_STOP)
        finally:
            run.kill()
    root_cause = log.read_text().split("Root Cause")[-1]
    assert re.search(r"rank +: 1 ", root_cause) and re.search(r"exitcode +: -9 ", root_cause)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in ranks.values())


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def rank_of(pid):
    with open(f"/proc/{pid}/environ") as file:
        return dict(entry.split("=", 1) for entry in file.read().split("\0") if "=" in entry).get("RANK")


NO_MEMORY = """
import torch
from hrm_megatron.model.hrm import HRMModel

def states(*_, **__):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB." + chr(10) + "More.")
HRMModel.states = states
"""


def test_too_little_memory_names_ways_out(launch, fullbatch_arguments):
    run = launch(*fullbatch_arguments, prelude=NO_MEMORY)
    assert run.code == 1 and "Traceback" not in run.output and len(run.errors) == 1, run.output
    assert run.errors[0].startswith("error: rank 0: CUDA out of memory. Tried to allocate 20.00 MiB. Way out: "
                                    "--recompute-granularity selective ")
