"""The job array of tokenization, and the Kubernetes example: what they would run."""
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
NOTE = f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n"


@pytest.fixture
def task(tmp_path):
    python = tmp_path / "python"
    python.write_text(NOTE)
    python.chmod(0o755)

    def run(number, count, file="launch_scripts/preprocess_slurm.sh", **variables):
        job = dict(SLURM_ARRAY_TASK_ID=str(number), SLURM_ARRAY_TASK_COUNT=str(count), SLURM_ARRAY_TASK_MIN="0",
                   SLURM_ARRAY_TASK_MAX=str(count - 1), SLURM_CPUS_PER_TASK="6", PYTHON=str(python),
                   PATH="/usr/bin:/bin")
        return subprocess.run([file, "--input", "a b"], cwd=ROOT, capture_output=True, text=True,
                              env={name: value for name, value in (job | variables).items() if value})
    return run


def test_each_task_makes_its_share(task):
    tool = str(ROOT / "tools" / "preprocess_data.py")
    assert [json.loads(task(number, 3).stdout) for number in range(3)] == [
        [tool, "--workers", "6", "--input", "a b", "--shard", f"{number}/3"] for number in range(3)]


def test_the_code_is_of_the_checkout_that_the_script_belongs_to(task, tmp_path):
    """Slurm runs a copy of the script, wherever the job was submitted, and shows all tasks of an array."""
    spool, other, scontrol = (tmp_path / name for name in ("spool/slurm_script", "other", "scontrol"))
    own = ROOT / "launch_scripts" / "preprocess_slurm.sh"
    spool.parent.mkdir()
    spool.write_bytes(own.read_bytes())
    (other / "hrm_megatron").mkdir(parents=True)
    scontrol.write_text(f"#!/bin/bash\nfor task in 1 2; do echo '   Command={own} --seed 1'; done\n")
    for program in (spool, scontrol):
        program.chmod(0o755)
    made = task(0, 3, spool, PATH=f"{tmp_path}:/usr/bin:/bin", SLURM_JOB_ID="77", SLURM_SUBMIT_DIR=str(other))
    assert json.loads(made.stdout)[0] == str(ROOT / "tools" / "preprocess_data.py")
    unasked = task(0, 3, spool, PATH=f"{tmp_path}:/usr/bin:/bin", SLURM_JOB_ID="", SLURM_SUBMIT_DIR=str(other))
    assert json.loads(unasked.stdout)[0] == str(other / "tools" / "preprocess_data.py")  # without a job it shows all
    scontrol.write_text("#!/bin/bash\nexit 1\n")
    (other / "hrm_megatron").rmdir()
    refused = task(0, 3, spool, PATH=f"{tmp_path}:/usr/bin:/bin", SLURM_JOB_ID="77", SLURM_SUBMIT_DIR=str(other))
    assert refused.stderr.startswith(f"preprocess_slurm.sh: no hrm_megatron in {other}: submit the project's own file")


def test_a_dead_task_is_made_again_with_the_same_number_of_shares(task):
    again = task(3, 1, SLURM_ARRAY_TASK_MIN="3", SLURM_ARRAY_TASK_MAX="3", TASKS="16")
    assert json.loads(again.stdout)[-1] == "3/16"


@pytest.mark.parametrize("number, variables, message", [
    (2, dict(SLURM_ARRAY_TASK_MIN="2", SLURM_ARRAY_TASK_MAX="4"), "leave shares out: set TASKS to all"),
    (1, dict(SLURM_ARRAY_TASK_MAX="8"), "leave shares out"),  # 0-8:4
    (3, dict(TASKS="3"), "task 3, but 3 shares: --array 0-2"),
    (0, dict(TASKS="all"), "TASKS=all: give a whole number"),
    (0, dict(SLURM_ARRAY_TASK_ID=""), "not inside a job array"),
])
def test_shares_that_nobody_would_make_are_refused(task, number, variables, message):
    refused = task(number, 3, **variables)
    assert refused.returncode and message in refused.stderr and not refused.stdout


def kubernetes():
    """(the job of a pod, its container)."""
    job = yaml.safe_load((ROOT / "launch_scripts" / "train_kubernetes.yaml").read_text())["spec"]["replicatedJobs"][0]
    pods = job["template"]["spec"]
    return pods, pods["template"]["spec"]["containers"][0]


def test_the_kubernetes_example_starts_what_it_says(tmp_path):
    pods, container = kubernetes()
    [script] = container["args"]
    (tmp_path / "python").write_text('#!/bin/bash\necho "$*"\n')
    (tmp_path / "python").chmod(0o755)
    done = subprocess.run([*container["command"], script], capture_output=True, text=True,
                          env=dict(PATH=f"{tmp_path}:/usr/bin:/bin", JOB_COMPLETION_INDEX="1", HOSTNAME="hrm-node-0-1"))
    assert done.returncode == 0, done.stderr
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert f"--nnodes {pods['completions']} --nproc-per-node {gpus} --node-rank 1 " in done.stdout
    assert pods["parallelism"] == pods["completions"] and " --exit-signal SIGUSR1" in done.stdout


LISTENS_LATE = f"""#!{sys.executable}
import pathlib, signal, sys, time
here = pathlib.Path(__file__).parent
(here / "begun").touch()
for _ in range(3000):
    if (here / "slept").exists():
        break
    time.sleep(0.01)
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(0))
time.sleep(60)
"""


def test_a_pod_that_is_evicted_before_its_ranks_listen_tells_them_once_more(tmp_path):
    _, container = kubernetes()
    for name, text in (("python", LISTENS_LATE), ("sleep", '#!/bin/bash\n: >"${0%/*}/slept"\nexec /bin/sleep 0.1\n')):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    with subprocess.Popen([*container["command"], *container["args"]], env=dict(
            PATH=f"{tmp_path}:/usr/bin:/bin", JOB_COMPLETION_INDEX="1", HOSTNAME="hrm-node-0-1")) as pod:
        while not (tmp_path / "begun").exists():
            assert pod.poll() is None
            time.sleep(0.01)
        pod.send_signal(signal.SIGTERM)
        assert pod.wait(30) == 1  # all has been saved, but the run is not done
