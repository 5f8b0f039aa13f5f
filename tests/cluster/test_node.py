"""A rank is told of a limit once, as soon as it listens, whoever started it; what a node cannot do is refused."""
from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time

import pytest

from hrm_megatron.cluster.failures import REFUSED, first_cause, read_failures

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


SLURM = dict(SLURM_PROCID="0", SLURM_LOCALID="0", SLURM_STEP_TASKS_PER_NODE="8(x128)")
LIMITS = [sys.executable, "-c", "import resource; print(*resource.getrlimit(resource.RLIMIT_NOFILE))"]


def run_node(folder, *command, flags=(), soft=512, hard=1024, ranks="1024"):
    """Run a command on a node without GPUs."""
    return subprocess.run(
        [sys.executable, "-m", "hrm_megatron.cluster.node", "--logs", folder, *flags, "--", *command],
        capture_output=True, text=True,
        env={**os.environ, **SLURM, "SLURM_STEP_NUM_TASKS": ranks, "SLURMD_NODENAME": "n2", "CUDA_VISIBLE_DEVICES": ""},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard)))


def test_ranks_may_open_all_the_files_that_the_node_allows(tmp_path):
    assert run_node(tmp_path, *LIMITS, flags=["--rank"], ranks="8").stdout.split() == ["1024", "1024"]


@pytest.mark.parametrize("flags, command, said", [
    (["--rank"], LIMITS, "a process on n2 may open 1024 files (ulimit -Hn), and 1024 ranks need 2304: raise that"),
    ([], ["torchrun", "--nnodes", "128", "--nproc-per-node=8", "-m", "x"], "and 1024 ranks need 2304: raise that"),
    (["--numa-binding", "node"], ["torchrun", "--nnodes", "1:2", "--nproc-per-node", "gpu"], "say none (NUMA=none)"),
])
def test_what_a_node_cannot_do_is_one_line_and_stops_the_job(tmp_path, flags, command, said):
    done = run_node(tmp_path, *command, flags=flags)
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and said in done.stderr
    assert first_cause(read_failures(tmp_path), 1) == (REFUSED, done.stderr.removeprefix("error: ").strip())
