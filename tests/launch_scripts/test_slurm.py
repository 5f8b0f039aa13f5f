"""The Slurm script with made-up SLURM_* variables, and a srun and a scontrol that play two nodes on this machine."""
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.ports import free_port

ROOT = Path(__file__).parents[2]
SCRIPT = "launch_scripts/train_slurm.sh"
# Each "node" is a torchrun of its own on this machine.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do case $1 in
    --ntasks) n=$2; shift 2 ;; --nodes | --ntasks-per-node) shift 2 ;; *) shift ;;
esac; done
trap 'kill -USR1 "${pids[@]}"' USR1
for ((i = 0; i < n; i++)); do SLURM_NODEID=$i SLURMD_NODENAME=node$((i + 1)) "$@" & pids+=($!); done
for pid in "${pids[@]}"; do
    while wait "$pid"; code=$?; ((code > 128)) && kill -0 "$pid" 2>/dev/null; do :; done
    ((code == 0)) || status=$code
done
exit "${status:-0}"
"""
# Slurm's controller is silent as often as the file has lines, from when the launch has ended.
SILENT = """#!/usr/bin/env bash
cd "$(dirname "$0")"
answers() { ! [ -s silent ] || ! sed -i 1d silent; }
"""
SCONTROL = SILENT + """
[[ $* == "show hostnames "* ]] || answers || exit 1
echo "$*" >>asked
case "$*" in
    "show hostnames node[1-2]") printf 'node1\\nnode2\\n' ;;
    "show hostnames "*) tr , '\\n' <<<"${*: -1}" ;;
    "show job 77" | "show job 70_3")
        printf "JobId=77 ExcNodeList=${EXCLUDED:-(null)} Requeue=1\\n   Command=$COMMAND\\n" ;;
esac
"""
SQUEUE = SILENT + """
case "$*" in
    *"--jobs $OTHER,77 --states RUNNING,COMPLETING,SUSPENDED "*) echo "$OTHER" ;;
    *--states*) ;;
    *"--jobs 70 "*) printf 'PENDING JobArrayTaskLimit\\nRUNNING None\\n' ;;
    *"--jobs 77 "* | *"--jobs 70_3 "*) answers && echo "$STATE" ;;
    *) exit 1 ;;
esac
"""
SINFO = """#!/usr/bin/env bash
printf 'node1\\nnode2\\nnode3\\nnode3\\n'
"""
SLEEP = """#!/usr/bin/env bash
echo "$1" >>"$(dirname "$0")/slept"
exec /bin/sleep 0.05
"""
STAND_IN = Path(__file__).with_name("stand_in.py")


@pytest.fixture
def script(tmp_path):
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("squeue", SQUEUE), ("sinfo", SINFO),
                       ("sleep", SLEEP),
                       ("python", STAND_IN.read_text().replace("#!/usr/bin/env python3", f"#!{sys.executable}"))):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    job = dict(SLURM_NNODES="2", SLURM_GPUS_ON_NODE="1", SLURM_JOB_ID="77", SLURM_JOB_NODELIST="node[1-2]",
               SLURM_SUBMIT_DIR=str(ROOT), MASTER_ADDR="localhost", MASTER_PORT=str(free_port()), OMP_NUM_THREADS="1",
               TORCHRUN=str(Path(sys.executable).with_name("torchrun")), PYTHON=sys.executable, STATE="RUNNING None")

    def run(*arguments, until=None, file=SCRIPT, told=signal.SIGUSR1, **variables):
        """Run the script; SIGUSR1 goes to it as soon as `until` exists."""
        environment = {**os.environ, **job, **variables, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        with subprocess.Popen([file, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              text=True, env={name: value for name, value in environment.items() if value}) as process:
            while until is not None and not until.exists() and process.poll() is None:
                time.sleep(0.01)
            if until is not None:
                process.send_signal(told)
            out, err = process.communicate(timeout=240)
            return subprocess.CompletedProcess(process.args, process.returncode, out, err)
    return run


def test_two_nodes_train_one_model(script, commands):
    done = script("--num-layers", 2, "--hidden-size", 32, "--num-attention-heads", 4, "--seq-length", 96, "--lr", 1e-3,
                  "--global-batch-size", 2, "--train-iters", 2, "--eval-iters", 0, "--log-interval", 1,
                  "--sampled-data-path", "tests/golden/fullbatch/sampled", TP="2", **commands.environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("\nstep 2/2  loss") == 1  # one world of two, not two of one
    assert "layout: 2 ranks = TP 2 x PP 1 x CP 1 x DP 1" in done.stdout


def test_the_command_is_shown(script):
    shown = script("--dry-run", "--train-iters", "9", "--load=runs/a b", "--save", "runs/a b", PRESET="XL", TP="2",
                   PP="4", SLURM_GPUS_ON_NODE="8", MASTER_PORT="1")
    assert shown.returncode == 0, shown.stderr
    for part in ("--logs runs/a\\ b/slurm/77.0 -- ", "srun --ntasks 2 --ntasks-per-node 1 --kill-on-bad-exit=1 ",
                 "--nnodes 2 --nproc-per-node 8 ",
                 "--rdzv-id 77 --rdzv-backend c10d --rdzv-endpoint localhost:1 ", "--hrm-preset XL ",
                 "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 4 --context-parallel-size 1 ",
                 "--sequence-parallel --exit-signal-handler --exit-signal SIGUSR1 --train-iters 9 ",
                 r"--load=runs/a\ b --save runs/a\ b"):
        assert part in shown.stdout


OUTSIDE = dict(SLURM_NNODES="", SLURM_JOB_ID="", SLURM_JOB_NODELIST="", SLURM_GPUS_ON_NODE="")


def test_the_command_is_shown_outside_a_job_too(script):
    shown = script("--dry-run", **OUTSIDE, NODES="4", GPUS="8", TP="2")
    assert shown.returncode == 0, shown.stderr
    assert "srun --ntasks 4 " in shown.stdout and "--nproc-per-node 8 --rdzv-id JOB_ID " in shown.stdout


def test_a_preset_brings_its_layout(script):
    from hrm_megatron.planner.presets import default_layout, layout_flags

    shown = script("--dry-run", "--seq-length", "4096", **OUTSIDE, NODES="64", GPUS="8", PRESET="32B", LAYOUT="preset")
    flags = " ".join(layout_flags(default_layout("32B", 512)))
    assert f"--hrm-preset 32B {flags} --seq-length 4096" in shown.stdout


def test_help_needs_no_job(script):
    shown = script("--help", **OUTSIDE)
    assert shown.returncode == 0 and "GPUS    per node" in shown.stdout and "#" not in shown.stdout


def test_the_binding_to_numa_nodes_is_left_to_the_nodes(script, tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert "numa" not in script("--dry-run").stdout
    assert "hrm_megatron.cluster.node --numa-binding socket -- " in script("--dry-run", NUMA="socket").stdout


def test_what_the_user_exported_reaches_the_ranks(script):
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in script("--dry-run", TP="2").stdout
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in (ROOT / SCRIPT).read_text()


def test_a_task_for_each_gpu_and_a_container(script):
    shown = script("--dry-run", LAUNCH="srun", SLURM_GPUS_ON_NODE="8", SLURM_CPUS_ON_NODE="104", CONTAINER="hrm.sqsh",
                   MOUNTS="/data:/data", PYTHON="").stdout
    for part in ("srun --ntasks 16 --ntasks-per-node 8 --cpus-per-task=13 ", "--cpu-bind=cores --mem-bind=local ",
                 f"--container-image=hrm.sqsh --container-mounts={ROOT}:{ROOT}", ",/data:/data ",
                 "python -m hrm_megatron.cluster.node --rank -- python -m hrm_megatron.pretrain "):
        assert part in shown.replace("\\,", ","), part
    assert "torchrun" not in shown and f"{sys.prefix}/bin" not in shown


class Run:
    """Starts of one job, in a folder of its own, by the stand-in for torchrun."""

    def __init__(self, script, folder):
        self.script, self.folder, self.run = script, folder, folder / "run"

    def __call__(self, restart=0, steps=12, **variables):
        (self.folder / "asked").unlink(missing_ok=True)
        variables = dict(TORCHRUN=str(STAND_IN), PREFLIGHT="0", SLURM_RESTART_COUNT=str(restart)) | variables
        return self.script("--train-iters", steps, "--load", self.run, "--save", self.run, **variables)

    @property
    def asked(self):
        """What Slurm was asked to do."""
        asked = (self.folder / "asked").read_text().splitlines()
        return [line for line in asked if not line.startswith("show ")]

    @property
    def ends(self):
        return [one["end"] for one in json.loads((self.run / "slurm" / "attempts.json").read_text())]


@pytest.fixture
def run(script, tmp_path):
    return Run(script, tmp_path)


def test_a_finished_run_is_not_queued_again(run):
    done = run()
    assert done.returncode == 0 and not run.asked and run.ends == ["finished"], done.stderr
    record = json.loads((run.run / "slurm" / "77.0" / "manifest.json").read_text())
    assert record["nodes"] == ["node1", "node2"] and "--train-iters" in record["arguments"]
    assert {"torch", "megatron-core"} <= set(record["versions"]) and record["git_commit"]


def test_a_time_limit_queues_the_run_again_and_it_goes_on(run):
    told = run(steps=200, until=run.run / "steps")
    assert told.returncode == 0 and run.asked == ["requeue 77"], told.stderr
    saved = int((run.run / "latest_checkpointed_iteration.txt").read_text())
    assert 0 < saved < 200 and f"time limit, goes on after step {saved}" in told.stderr
    assert run(restart=1, steps=saved + 3).returncode == 0 and run.ends == ["time limit", "finished"]
    assert [int(line) for line in (run.run / "steps").read_text().split()] == [*range(1, saved + 4)]


@pytest.mark.parametrize("variables, end", [({}, "ended early"), (dict(STATE="COMPLETING TimeLimit"), "time limit")])
def test_a_run_that_ends_before_its_last_evaluation_makes_it_up_in_one_more_start(run, variables, end):
    assert run(EXIT_AT="12", **variables).returncode == 0 and run.asked == ["requeue 77"]
    assert run(restart=1).returncode == 0 and not run.asked and run.ends == [end, "finished"]
    assert (run.run / "steps").read_text().split()[-1] == "12"


def test_a_start_that_is_told_of_the_limit_before_it_launches_has_evaluated_nothing(run):
    run(EXIT_AT="12")
    told = run(restart=1, PREFLIGHT="1", PYTHON=str(run.folder / "python"),
               until=run.run / "slurm" / "77.1" / "preflight")
    assert told.returncode == 1 and run.ends == ["ended early", "time limit"], told.stderr
    assert not (run.run / "evaluated.json").exists() and "slurm: no progress: step 12 was" in told.stderr


def test_a_limit_that_comes_before_the_save_is_done_is_still_a_limit(run):
    assert run(FAIL_AT="2", STATE="COMPLETING TimeLimit").returncode == 0
    assert run.asked == ["requeue 77"] and run.ends == ["time limit"]


def test_a_failure_without_progress_stops_with_one_line(run):
    first = run(FAIL_AT="11")
    assert first.returncode == 0 and run.asked == ["requeue 77"]
    assert "first failure: node node1, local rank 0" in first.stderr and "ZeroDivisionError: at step 11" in first.stderr
    second = run(restart=1, FAIL_AT="11")
    assert second.returncode == 1 and not run.asked and run.ends == ["failed", "failed"]
    assert [line for line in second.stderr.splitlines() if line.startswith("slurm: no progress: step 10 was")]


def test_a_cancelled_job_is_not_queued_again(run):
    assert run(STATE="COMPLETING None").returncode == 1
    assert not run.asked and run.ends == ["stopped by Slurm"]


def test_a_bad_node_is_left_out_and_remembered(run):
    python = str(run.folder / "python")
    found = run(PREFLIGHT="1", PYTHON=python, SICK_NODE="node2")
    assert found.returncode == 0 and "node2: 7 of 8 GPUs" in found.stderr, found.stderr
    assert run.asked == ["requeue 77", "update JobId=77 ExcNodeList=node2"]
    assert not (run.run / "steps").exists()
    again = run(restart=1)  # Slurm gave it to the job once more
    assert run.asked[0] == "requeue 77" and run.ends == ["bad node", "bad node"] and "7 of 8 GPUs" in again.stderr


@pytest.mark.parametrize("job, own", [("70", "70_3"), ("77", "77")])  # the first is the array's own number
def test_a_task_of_an_array_speaks_for_itself_alone(run, job, own):
    """A job that such a task has submitted inherits its variables, but has a number of its own."""
    task = dict(SLURM_JOB_ID=job, SLURM_ARRAY_JOB_ID="70", SLURM_ARRAY_TASK_ID="3")
    failed = run(FAIL_AT="11", **task)
    assert run.asked == [f"requeue {own}"] and run.ends == ["failed"], failed.stderr
    found = run(restart=1, PREFLIGHT="1", PYTHON=str(run.folder / "python"), SICK_NODE="node2", **task)
    assert run.asked == [f"requeue {own}", f"update JobId={own} ExcNodeList=node2"], found.stderr
    assert run.ends == ["failed", "bad node"]


@pytest.mark.parametrize("given, gpus", [
    (dict(SLURM_GPUS_ON_NODE="2"), 2),
    (dict(SLURM_GPUS_ON_NODE="", GPUS="2"), 2 if any(Path("/dev").glob("nvidia[0-9]*")) else 0),
])
def test_the_check_expects_the_gpus_that_there_should_be(run, given, gpus):
    """Whether the node of the batch script has nvidia-smi or not."""
    python = run.folder / "python"
    python.write_text(f"#!/bin/sh\ncase \"$*\" in\n*cluster.preflight*) echo \"$*\" >>{run.folder}/checks ;;\n"
                      f"*) exec {sys.executable} \"$@\" ;;\nesac\n")
    done = run(PREFLIGHT="1", PYTHON=str(python), **given)
    checks = (run.folder / "checks").read_text().splitlines()
    assert len(checks) == 2 and all(f" --gpus {gpus} " in check for check in checks), done.stderr
    assert ("slurm: neither Slurm nor this node has GPUs, so the check expects none" in done.stderr) == (gpus == 0)


def test_nodes_to_avoid_are_named_once_and_must_leave_enough(run):
    found = run(PREFLIGHT="1", PYTHON=str(run.folder / "python"), SICK_NODE="node2", EXCLUDED="node9,node2")
    assert run.asked == ["requeue 77", "update JobId=77 ExcNodeList=node2,node9"] and "are left" not in found.stderr
    found = run(restart=1, PREFLIGHT="1", PYTHON=str(run.folder / "python"), SICK_NODE="node2", EXCLUDED="node3")
    assert "slurm: only 1 of 2 nodes are left without node2,node3, so the job waits" in found.stderr
    assert found.stderr.count("scontrol update JobId=77 ExcNodeList=\n") == 1


@pytest.mark.parametrize("silent, told, code, ends, pauses", [
    (3, None, 0, ["failed"], [1, 2, 4]),  # a hiccup
    (99, signal.SIGUSR1, 2, ["time limit"], [1, 2, 4, 8, 15] * 2),
    (99, signal.SIGTERM, 1, ["stopped by Slurm"], [1, 2]),  # seconds are left
])
def test_a_controller_that_does_not_answer_hides_no_end(run, silent, told, code, ends, pauses):
    (run.folder / "silent").write_text("\n" * silent)
    until = {} if told is None else dict(until=run.run / "steps", told=told)
    done = run(FAIL_AT="" if told else "11", **until)
    assert done.returncode == code and run.ends == ends, done.stderr
    waited = [int(line) for line in (run.folder / "slept").read_text().split()]
    assert [seconds for seconds in waited if seconds != 5] == pauses  # 5: between two signals to the ranks


def test_another_job_of_the_run_is_left_alone(run):
    (run.run / "slurm" / "76.0").mkdir(parents=True)
    attempts = run.run / "slurm" / "attempts.json"
    attempts.write_text(json.dumps([dict(job="76", restart=0, nodes=["node3"], first_step=0, last_step=0)]))
    before = attempts.read_text().replace("}", ', "end": "running"}')
    attempts.write_text(before)
    refused = run(OTHER="76")
    assert refused.returncode == 1 and attempts.read_text() == before
    assert "slurm: job 76 trains this run; scancel it, or wait until it has ended\n" in refused.stderr
    assert run(OTHER="75").returncode == 0 and run.ends == ["lost", "finished"]


def test_a_run_that_a_container_would_lose_is_refused(run):
    """srun begins a container that does not see the run."""
    srun = run.folder / "srun"
    srun.write_text(srun.read_text().replace("while", f'[[ $* != *" begin "* ]] || rm -r {run.run}\nwhile', 1))
    refused = run(CONTAINER="hrm.sqsh")
    assert refused.returncode == 1 and not run.run.exists()
    assert f"error: --save {run.run}: not mounted in the container; add it to MOUNTS\n" in refused.stderr


def test_the_code_is_of_the_checkout_that_the_script_belongs_to(script, tmp_path):
    """Slurm runs a copy of the script, wherever the job was submitted."""
    spool, other = tmp_path / "spool" / "slurm_script", tmp_path / "other"
    spool.parent.mkdir()
    spool.write_bytes((ROOT / SCRIPT).read_bytes())
    spool.chmod(0o755)
    (other / "hrm_megatron").mkdir(parents=True)

    def root(command):
        shown = script("--dry-run", file=spool, COMMAND=f"{command} --seed 1", SLURM_SUBMIT_DIR=str(other),
                       CONTAINER="x")
        return shown.stderr or re.search("container-mounts=([^:]+):", shown.stdout)[1]

    assert root(ROOT / SCRIPT) == root(os.path.relpath(ROOT / SCRIPT, other)) == str(ROOT)
    assert root(spool) == str(other)
    (other / "hrm_megatron").rmdir()
    assert root(spool) == f"train_slurm.sh: no hrm_megatron in {other}: submit the project's own file, no copy\n"


def test_a_copy_shows_the_command_outside_a_job_without_asking_slurm(script, tmp_path):
    copy = tmp_path / "copy.sh"
    copy.write_bytes((ROOT / SCRIPT).read_bytes())
    copy.chmod(0o755)
    shown = script("--dry-run", **OUTSIDE, file=copy, SLURM_SUBMIT_DIR="", NODES="1", GPUS="1")
    assert shown.returncode == 0 and not shown.stderr and not (tmp_path / "asked").exists()


def test_jobs_on_one_node_do_not_meet(script):
    for job, port in (("77", 20154), ("78", 20156), ("1234567", 29134)):
        assert f"--rdzv-endpoint localhost:{port} " in script("--dry-run", MASTER_PORT="", SLURM_JOB_ID=job).stdout


def test_a_start_whose_end_nobody_saw_counts_as_a_failure(run):
    assert run().returncode == 0
    attempts = run.run / "slurm" / "attempts.json"
    attempts.write_text(attempts.read_text().replace("finished", "running").replace('"restart": 0', '"restart": 1'))
    assert run(restart=2, steps=15).returncode == 0 and run.ends == ["lost", "finished"]


@pytest.mark.parametrize("variables, message", [
    (dict(TP="1", LAYOUT="preset"), "LAYOUT=preset chooses TP, PP and CP: leave them out"),
    (dict(LAYOUT="best"), "LAYOUT=best: the only one that is known is preset"),
    (dict(LAYOUT="preset", PRESET="XL"), "has no default layout for 2 GPUs, but for 8, 64, 512"),
    (dict(OUTSIDE, GPUS="8"), "outside a Slurm job --dry-run needs the number of nodes: set NODES"),
    (dict(NODES="3"), "NODES=3, but Slurm gave the job 2 nodes"),
    (dict(TP="3"), "TP*PP*CP=3 does not divide the 2 GPUs of the job"),
    (dict(LAUNCH="mpirun"), "LAUNCH=mpirun: choose torchrun or srun"),
    (dict(PP="x"), "are whole numbers from 1, not 'x'"),
    (dict(SLURM_NNODES=""), "not inside a Slurm job"),
    (dict(SLURM_GPUS_ON_NODE="2", SLURM_CPUS_ON_NODE="1"), "1 cores for 2 ranks: add --exclusive, or --cpus-per-task"),
    (dict(SLURM_GPUS_ON_NODE=""), "Slurm gave no GPUs: add --gpus-per-node"),
])
def test_what_cannot_be_is_refused(script, variables, message):
    refused = script("--dry-run", **variables)
    assert refused.returncode != 0 and message in refused.stderr and not refused.stdout


@pytest.mark.parametrize("arguments, message", [
    (["--save", "runs/a", "--train-iters", "9"], "--load is '': the job goes on by itself from what it saved"),
    (["--save", "runs/a", "--load", "runs/a"], "--train-iters '': the job goes on by itself until then"),
    (["--save", "runs/a", "--load", "runs/a", "--train-iters=many"], "--train-iters 'many'"),
])
def test_what_could_not_go_on_by_itself_is_refused(script, arguments, message):
    refused = script(*arguments)
    assert refused.returncode == 2 and message in refused.stderr and not refused.stdout
