"""A real Slurm with three nodes on this machine: limits, lost and bad nodes, failures and scancel.

What Slurm and our script do is the same for any training, so most jobs train by a stand-in whose start costs nothing.
"""
from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.launch_scripts.local_slurm import NODES, PROGRAMS, LocalSlurm
from tests.ports import free_port

ROOT = Path(__file__).parents[2]
MISSING = [program for program in PROGRAMS if shutil.which(program, path=f"{os.environ['PATH']}:/usr/sbin") is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)} (Debian's slurmctld, slurmd, munge)"),
    pytest.mark.skipif(os.geteuid() != 0, reason="the daemons of Slurm are started by root"),
]
STAND_IN = ROOT / "tests" / "launch_scripts" / "stand_in.py"
STEPS = 40


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    os.environ["PATH"] += ":/usr/sbin"
    cluster = LocalSlurm(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


class Job:
    """A job that trains on two nodes, in a folder of its own."""

    def __init__(self, slurm, folder, *arguments, steps=STEPS, nodes=2, **variables):
        self.slurm, self.run = slurm, folder / "run"
        variables = dict(PREFLIGHT="0", GPUS="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()),
                         OMP_NUM_THREADS="1", PYTHON=sys.executable, TORCHRUN=str(STAND_IN)) | variables
        self.log = folder / "log"
        self.id = slurm("sbatch", "--parsable", "--chdir", ROOT, "--nodes", nodes, "--cpus-per-task", 1, "--time", 300,
                        "--output", self.log, "--signal", "B:USR1@1200", "launch_scripts/train_slurm.sh",
                        "--train-iters", steps, "--load", self.run, "--save", self.run, *arguments,
                        **variables).strip()

    def until_step(self, step):
        log = self.run / "steps"
        self.slurm.until(lambda: log.exists() and len(log.read_text().splitlines()) >= step)

    def near_its_limit(self):
        """Set the limit so that it is nearer than the signal ahead of it."""
        self.slurm("scontrol", "update", f"JobId={self.id}", "TimeLimit=10")

    @property
    def steps(self):
        return [int(line) for line in (self.run / "steps").read_text().split()]

    @property
    def ends(self):
        return [one["end"] for one in json.loads((self.run / "slurm" / "attempts.json").read_text())]

    @property
    def nodes(self):
        return [tuple(one["nodes"]) for one in json.loads((self.run / "slurm" / "attempts.json").read_text())]


@pytest.mark.survives("time limit of a job", "Slurm, stand-in for ranks")
def test_a_limit_saves_and_the_job_goes_on_from_there(slurm, tmp_path):
    job = Job(slurm, tmp_path, steps=600)  # Slurm looks at limits every 30 seconds
    job.until_step(3)
    job.near_its_limit()
    assert slurm.over(job.id)["JobState"] == "COMPLETED", job.log.read_text()
    assert job.ends == ["time limit", "finished"]
    assert job.steps == list(range(1, 601))  # none twice, none left out


@pytest.mark.survives("a node dies", "Slurm, stand-in for ranks")
def test_a_node_that_dies_costs_what_was_not_saved(slurm, tmp_path):
    job = Job(slurm, tmp_path, steps=200)
    job.until_step(15)
    try:
        slurm.kill_node(job.nodes[0][1])
        assert slurm.over(job.id)["JobState"] == "COMPLETED", job.log.read_text()
    finally:
        slurm("slurmd", "-N", job.nodes[0][1])
        slurm.until_idle()
    assert job.ends[0] in ("lost", "stopped by Slurm") and job.ends[1:] == ["finished"]
    assert job.nodes[0][1] not in job.nodes[1]
    repeated = len(job.steps) - 200
    assert sorted(set(job.steps)) == list(range(1, 201)) and 0 <= repeated < 10


def test_a_cancelled_job_stays_cancelled(slurm, tmp_path):
    job = Job(slurm, tmp_path, steps=400)
    job.until_step(3)
    slurm("scancel", job.id)
    assert slurm.over(job.id)["JobState"] == "CANCELLED"
    assert job.ends == ["stopped by Slurm"] and slurm.job(job.id)["Restarts"] == "0"


def test_a_failure_without_progress_ends_the_job(slurm, tmp_path):
    job = Job(slurm, tmp_path, FAIL_AT="15")
    assert slurm.over(job.id)["JobState"] == "FAILED"
    assert job.ends == ["failed", "failed"]
    log = job.log.read_text()
    assert log.count("no progress: step 10 was the last one saved") == 1
    first, *trace = (job.run / "slurm" / f"{job.id}.1" / "errors.txt").read_text().splitlines()
    assert first == f"first failure: node {job.nodes[1][0]}, local rank 0"
    assert trace[-1] == "ZeroDivisionError: at step 15"


@pytest.mark.survives("a bad node", "Slurm, stand-in for ranks")
def test_a_bad_node_is_left_out_of_the_next_start(slurm, tmp_path):
    python = tmp_path / "python"
    python.write_text(STAND_IN.read_text().replace("#!/usr/bin/env python3", f"#!{sys.executable}"))
    python.chmod(0o755)
    job = Job(slurm, tmp_path, PYTHON=str(python), PREFLIGHT="1", SICK_NODE="n2")
    facts = slurm.over(job.id)
    assert facts["JobState"] == "COMPLETED", job.log.read_text()
    assert facts["ExcNodeList"] == "n2"
    assert job.ends == ["bad node", "finished"] and job.nodes == [("n1", "n2"), ("n1", "n3")]
    assert "n2: 7 of 8 GPUs" in job.log.read_text()
    again = Job(slurm, tmp_path, PYTHON=str(python), PREFLIGHT="1", SICK_NODE="n2", steps=STEPS + 20)
    slurm.over(again.id)  # remembered by the run's folder, which another job finds
    assert "n2" not in again.nodes[-1] and set(again.nodes[-1]) <= set(NODES)


def test_a_second_job_of_a_run_stops_and_the_first_goes_on(slurm, tmp_path):
    first = Job(slurm, tmp_path, steps=150)
    first.until_step(3)
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "run").symlink_to(first.run)
    second = Job(slurm, tmp_path / "second", nodes=1)
    assert slurm.over(second.id)["JobState"] == "FAILED"
    assert f"slurm: job {first.id} trains this run; scancel it" in second.log.read_text()
    assert slurm.over(first.id)["JobState"] == "COMPLETED" and first.ends == ["finished"], first.log.read_text()


def test_a_job_that_has_too_few_nodes_left_says_so_and_how_it_goes_on(slurm, tmp_path):
    excluded = tmp_path / "run" / "slurm" / "excluded.json"
    excluded.parent.mkdir(parents=True)
    excluded.write_text(json.dumps(dict.fromkeys(NODES[:2], "7 of 8 GPUs")))
    job = Job(slurm, tmp_path)
    slurm.until(lambda: slurm.job(job.id)["ExcNodeList"] != "(null)")
    said = "slurm: only 1 of 2 nodes are left without n1,n2, so the job waits until you mend one, delete its line"
    assert said in job.log.read_text()
    excluded.write_text("{}")
    slurm("scontrol", "update", f"JobId={job.id}", "ExcNodeList=")
    assert slurm.over(job.id)["JobState"] == "COMPLETED" and job.ends == ["bad node", "finished"], job.log.read_text()


TRAINING = ("--num-layers", 2, "--hidden-size", 32, "--num-attention-heads", 4, "--seq-length", 96, "--lr", 1e-3,
            "--global-batch-size", 2, "--eval-iters", 0, "--log-interval", 1,
            "--sampled-data-path", "tests/golden/fullbatch/sampled")


@pytest.mark.survives("time limit of a job", "Slurm, TP 2")
@pytest.mark.parametrize("launch", ["torchrun", "srun"])
def test_a_requeued_run_ends_bitwise_as_one_that_was_never_stopped(slurm, tmp_path, torch_reads, launch):
    import torch

    steps, torchrun = 60, str(Path(sys.executable).with_name("torchrun"))
    jobs = []
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
        jobs.append(Job(slurm, tmp_path / name, *TRAINING, steps=steps, TORCHRUN=torchrun, TP="2", LAUNCH=launch))
        if name == "stopped":
            slurm.until((jobs[1].run / "arguments.txt").exists)  # written ahead of the first step
            slurm("scancel", "--batch", "--signal", "USR1", jobs[1].id)  # as ahead of a limit, but now
        assert slurm.over(jobs[-1].id)["JobState"] == "COMPLETED", jobs[-1].log.read_text()[-5000:]
    whole, stopped = jobs
    assert whole.ends == ["finished"] and stopped.ends == ["time limit", "finished"]
    last = [next(line for line in job.log.read_text().splitlines() if f"step {steps}/{steps}  loss" in line)
            for job in jobs]
    assert last[0].split("loss")[1].split()[0] == last[1].split("loss")[1].split()[0]
    ours, theirs = (torch_reads(job.run / f"iter_{steps:07d}") for job in jobs)
    assert ours.keys() == theirs.keys() and len(ours) > 10
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
