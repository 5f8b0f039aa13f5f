"""A rank is told of a limit once, as soon as it listens, whoever started it."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

RANK = """
import os, pathlib, signal, sys, time
here, told = pathlib.Path(sys.argv[1]), []
(here / "begun").touch()
while not (here / "listen").exists():
    time.sleep(0.01)
signal.signal(signal.SIGUSR1, lambda *_: told.append(1))
(here / "listens").touch()
while not (told and (here / "end").exists()):
    time.sleep(0.01)
print("told", len(told), os.environ.get("RANK"))
sys.exit(3)
"""
TORCHRUN = """
import subprocess, sys
sys.exit(subprocess.run([sys.executable, *sys.argv[sys.argv.index("-c"):]]).returncode)
"""


def wait_for(place):
    while not place.exists():
        time.sleep(0.01)


@pytest.mark.parametrize("by", ["torchrun", "srun"])
def test_a_rank_hears_of_the_limit_once(tmp_path, by):
    command = [sys.executable, "-c", RANK, str(tmp_path)]
    if by == "torchrun":
        (tmp_path / "torchrun").write_text(f"#!{sys.executable}\n{TORCHRUN}\n")
        (tmp_path / "torchrun").chmod(0o755)
        command[0] = str(tmp_path / "torchrun")
    slurm = dict(SLURM_PROCID="5", SLURM_LOCALID="1", SLURM_STEP_NUM_TASKS="8", SLURM_STEP_TASKS_PER_NODE="4(x2)",
                 SLURMD_NODENAME="n2")
    node = subprocess.Popen(
        [sys.executable, "-m", "hrm_megatron.cluster.node", "--logs", tmp_path / "logs",
         *(["--rank"] if by == "srun" else []), "--", *command], stdout=subprocess.PIPE, text=True,
        env={**os.environ, **slurm})
    wait_for(tmp_path / "begun")
    node.send_signal(signal.SIGUSR1)  # nobody listens yet, and nobody dies of it
    (tmp_path / "listen").touch()
    wait_for(tmp_path / "listens")
    for _ in range(3):
        node.send_signal(signal.SIGUSR1)
        time.sleep(0.05)  # else the system makes one of them
    (tmp_path / "end").touch()
    out, _ = node.communicate()
    assert out.split() == ["told", "1", "5" if by == "srun" else "None"] and node.returncode == 3
    if by == "srun":
        assert (tmp_path / "logs" / "n2" / "1" / "stdout.log").read_text() == out
