#!/usr/bin/env python3
"""Stands in for a node's torchrun, with a rank that saves made-up steps: a start takes no seconds, and no cores.

Called as torchrun is, or, as STAND_IN_FOR_PYTHON, as a Python whose check of nodes finds SICK_NODE to lack a GPU.
"""
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

SAVE_INTERVAL, STEP_SECONDS = 10, 0.1
TRACKER = "latest_checkpointed_iteration.txt"


def value(flag):
    return sys.argv[sys.argv.index(flag) + 1]


def be_rank(node):
    """Save every tenth step, and at SIGUSR1 or EXIT_AT, which end it without an evaluation.

    The first node's rank says when all end.
    """
    told = []
    signal.signal(signal.SIGUSR1, lambda *_: told.append(1))
    save, steps = Path(value("--save")), int(value("--train-iters"))
    job = f"{os.environ['SLURM_JOB_ID']}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"
    ended = save / f"ended.{job}"
    while node and not ended.exists():
        time.sleep(STEP_SECONDS)
    if node:
        return
    save.mkdir(parents=True, exist_ok=True)
    try:
        train(save, steps, told)
    finally:
        ended.touch()  # as a rank ends that loses another


def train(save, steps, told):
    first = int((save / TRACKER).read_text()) if (save / TRACKER).exists() else 0
    for step in range(first + 1, steps + 1):
        time.sleep(STEP_SECONDS)
        if str(step) in os.environ.get("FAIL_AT", "").split():
            raise ZeroDivisionError(f"at step {step}")
        with open(save / "steps", "a") as log:
            print(step, file=log)
        ends = told or str(step) == os.environ.get("EXIT_AT")
        if step % SAVE_INTERVAL == 0 or step == steps or ends:
            (save / TRACKER).write_text(str(step))
        if ends:
            break
    else:
        (save / "evaluated.json").write_text(json.dumps(dict(iteration=steps)))


def be_torchrun():
    log = Path(value("--log-dir")) / "x" / "attempt_0" / "0"
    log.mkdir(parents=True)
    node = int(os.environ["SLURM_NODEID"])
    rank = subprocess.run([sys.executable, __file__, "--rank", str(node), *sys.argv[1:]], capture_output=True,
                          text=True)
    if rank.returncode > 0:
        message = dict(message=rank.stderr.splitlines()[-1], extraInfo=dict(py_callstack=rank.stderr))
        (log / "error.json").write_text(json.dumps(dict(message=message)))
    sys.exit(rank.returncode and 1)


def be_python():
    arguments = sys.argv[1:]
    if "hrm_megatron.cluster.preflight" not in arguments:
        os.execv(sys.executable, [sys.executable, *arguments])
    node = os.environ["SLURMD_NODENAME"]
    gpus = 7 if node == os.environ.get("SICK_NODE") else 8
    folder = Path(value("--output"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{node}.json").write_text(json.dumps(dict(node=node, gpus=gpus, expected_gpus=8)))


if __name__ == "__main__":
    if "--rank" in sys.argv:
        be_rank(int(value("--rank")))
    elif sys.argv[0].endswith("python"):
        be_python()
    else:
        be_torchrun()
