"""The Slurm script with made-up SLURM_* variables, and a srun and a scontrol that play two nodes on this machine."""
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = "launch_scripts/train_slurm.sh"
# Each "node" is a torchrun of its own on this machine.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do case $1 in --ntasks) n=$2; shift 2 ;; --ntasks-per-node) shift 2 ;; *) shift ;; esac; done
for ((i = 0; i < n; i++)); do "$@" & pids+=($!); done
for pid in "${pids[@]}"; do wait "$pid" || status=$?; done
exit "${status:-0}"
"""
SCONTROL = """#!/usr/bin/env bash
[ "$1 $2 $3" = "show hostnames node[1-2]" ] && printf 'localhost\\nnode2\\n'
"""


@pytest.fixture
def script(tmp_path):
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    job = dict(SLURM_NNODES="2", SLURM_GPUS_ON_NODE="1", SLURM_JOB_ID="77", SLURM_JOB_NODELIST="node[1-2]",
               SLURM_SUBMIT_DIR=str(ROOT), MASTER_PORT=str(port), OMP_NUM_THREADS="1",
               TORCHRUN=str(Path(sys.executable).with_name("torchrun")))

    def run(*arguments, **variables):
        environment = {**os.environ, **job, **variables, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        return subprocess.run([SCRIPT, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=240,
                              env={name: value for name, value in environment.items() if value})
    return run


def test_two_nodes_train_one_model(script, tmp_path):
    done = script("--num-layers", 2, "--hidden-size", 32, "--num-attention-heads", 4, "--seq-length", 96, "--lr", 1e-3,
                  "--global-batch-size", 2, "--train-iters", 2, "--eval-iters", 0, "--log-interval", 1,
                  "--sampled-data-path", "tests/golden/fullbatch/sampled", TP="2")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("\nstep 2/2  loss") == 1  # one world of two, not two of one
    assert "layout: 2 ranks = TP 2 x PP 1 x CP 1 x DP 1" in done.stdout


def test_the_command_is_shown(script):
    shown = script("--dry-run", "--save", "runs/a b", PRESET="XL", TP="2", PP="4", SLURM_GPUS_ON_NODE="8",
                   MASTER_PORT="1")
    assert shown.returncode == 0, shown.stderr
    for part in ("srun --ntasks 2 --ntasks-per-node 1 --kill-on-bad-exit=1 ", "--nnodes 2 --nproc-per-node 8 ",
                 "--rdzv-id 77 --rdzv-backend c10d --rdzv-endpoint localhost:1 ", "--hrm-preset XL ",
                 "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 4 --context-parallel-size 1 ",
                 r"--sequence-parallel --save runs/a\ b"):
        assert part in shown.stdout


OUTSIDE = dict(SLURM_NNODES="", SLURM_JOB_ID="", SLURM_JOB_NODELIST="", SLURM_GPUS_ON_NODE="")


def test_the_command_is_shown_outside_a_job_too(script):
    shown = script("--dry-run", **OUTSIDE, NODES="4", GPUS="8", TP="2")
    assert shown.returncode == 0, shown.stderr
    assert "srun --ntasks 4 " in shown.stdout and "--nproc-per-node 8 --rdzv-id JOB_ID " in shown.stdout


def test_help_needs_no_job(script):
    shown = script("--help", **OUTSIDE)
    assert shown.returncode == 0 and "GPUS    per node" in shown.stdout and "#" not in shown.stdout


def test_what_the_user_exported_reaches_the_ranks(script):
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in script("--dry-run", TP="2").stdout
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in (ROOT / SCRIPT).read_text()


@pytest.mark.parametrize("variables, message", [
    (dict(OUTSIDE, GPUS="8"), "outside a Slurm job --dry-run needs the number of nodes: set NODES"),
    (dict(NODES="3"), "NODES=3, but Slurm gave the job 2 nodes"),
    (dict(TP="3"), "TP*PP*CP=3 does not divide the 2 GPUs of the job"),
    (dict(PP="x"), "are whole numbers from 1, not 'x'"),
    (dict(SLURM_NNODES=""), "not inside a Slurm job"),
    (dict(SLURM_GPUS_ON_NODE=""), "Slurm gave no GPUs: add --gpus-per-node"),
])
def test_what_cannot_be_is_refused(script, variables, message):
    refused = script("--dry-run", **variables)
    assert refused.returncode != 0 and message in refused.stderr and not refused.stdout
