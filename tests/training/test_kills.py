"""Ranks and readers of data killed at any moment: started again, a run ends bitwise as if nothing had happened."""
from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hrm_megatron.checkpoint.folders import find_iteration
from tests.training.conftest import scalars
from tests.training.killed_rank import ALL, MOMENTS, draw_kills, happened, lost_steps
from tests.training.test_resume import tensors_that_differ

ROOT = Path(__file__).parents[2]
SAVE_INTERVAL = 3
KILLS = int(os.environ.get("HRM_KILLS", "100"))  # of each layout, where a start takes a second or two
KILLS_BY_TORCHRUN = 12  # where it takes half a minute
WORKERS = "--num-workers", 1
TP, PP = "--tensor-model-parallel-size", "--pipeline-model-parallel-size"
# Two micro-batches of a step on each replica, so that what reads them ahead is no more than a step ahead.
LAYOUTS = {"DP 2": (2, ("--micro-batch-size", 2)), "TP 2 x PP 2": (4, (TP, 2, PP, 2))}
PRELUDE = """
import os
from pathlib import Path
from tests.training.killed_rank import Killer
Killer({kills}, Path({notes!r}), int(os.environ["RANK"])).install()
"""


@pytest.fixture
def killed(launch, native_start, tmp_path, survived):
    """Let a run be killed as planned, and compare it with one that nothing happens to; `start_until_done` trains with
    what it is given, and these kills."""
    def compare(layout, ranks, arguments, kills, start_until_done):
        for name in "ab":
            shutil.copytree(native_start, tmp_path / name)
        folders = {name: ("--load", tmp_path / name, "--save", tmp_path / name, "--tensorboard-dir", tmp_path /
                          f"{name}_log") for name in "ab"}
        undisturbed = launch(*arguments, *folders["a"], ranks=ranks)
        assert undisturbed.code == 0, undisturbed.output[-3000:]
        notes = tmp_path / "notes"
        notes.mkdir()
        start_until_done([*arguments, *folders["b"], *WORKERS], kills, notes)
        assert happened(notes) == set(range(len(kills)))
        ends = [find_iteration(tmp_path / name) for name in "ab"]
        assert ends[0].name == ends[1].name and not tensors_that_differ(*ends)
        assert scalars(tmp_path / "a_log") == scalars(tmp_path / "b_log")
        assert not lost_steps(notes, kills, SAVE_INTERVAL)
        for moment, _, rank in kills:
            whom = "reader of data" if moment == "worker" else "rank"
            where = "" if moment == "worker" else f" in a {moment}"
            survived(f"kill -9 of {'every' if rank == ALL else 'a'} {whom}{where}", layout)
    return compare


MANY = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.mark.parametrize("layout, count, steps", [
    ("DP 2", 10, 12), *(pytest.param(layout, KILLS, 24, marks=MANY) for layout in LAYOUTS)])
def test_a_run_survives_its_kills(launch, fullbatch_arguments, killed, layout, count, steps):
    """Forked ranks, which start in a second; that torchrun starts them again is for the test below."""
    ranks, flags = LAYOUTS[layout]
    kills = draw_kills(count, ranks, steps, SAVE_INTERVAL, seed=1)
    assert {(moment, rank == ALL) for moment, _, rank in kills} == {*itertools.product(MOMENTS, (True, False))}

    def start_until_done(arguments, kills, notes):
        prelude = PRELUDE.format(kills=kills, notes=str(notes))
        for _ in range(ranks * len(kills) + 1):  # of a kill of all, some may die at the start that follows
            run = launch(*arguments, ranks=ranks, prelude=prelude, grace_seconds=0)
            if run.code == 0:
                return
        raise AssertionError(run.output[-3000:])
    arguments = [*fullbatch_arguments, *flags, "--train-iters", steps, "--save-interval", SAVE_INTERVAL]
    killed(layout, ranks, arguments, kills, start_until_done)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_torchrun_starts_a_run_again(fullbatch_arguments, killed, layout):
    ranks, flags = LAYOUTS[layout]

    def start_until_done(arguments, kills, notes):
        done = subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
             "--max-restarts", str(len(kills) * ranks), "-m", "tests.training.killed_rank", *map(str, arguments)],
            cwd=ROOT, capture_output=True, text=True, env=os.environ | dict(
                TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1", KILLS=json.dumps(kills), KILLED=str(notes),
                OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)))
        assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    killed(f"{layout}, torchrun", ranks, [*fullbatch_arguments, *flags, "--save-interval", SAVE_INTERVAL],
           draw_kills(KILLS_BY_TORCHRUN, ranks, 24, SAVE_INTERVAL, seed=ranks), start_until_done)


def test_restarts_that_would_hang_are_refused():
    from hrm_megatron.config import ConfigError
    from hrm_megatron.training.restarts import check_restarts

    shared = {"TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with pytest.raises(ConfigError, match="--max-restarts 3: would hang .*; export TORCH_DISABLE_SHARE_RDZV_TCP"):
        check_restarts(shared)
    for fine in ({}, shared | {"TORCHELASTIC_MAX_RESTARTS": "0"}, shared | {"TORCHELASTIC_USE_AGENT_STORE": "False"}):
        check_restarts(fine)


def test_a_start_without_a_launcher_is_refused(launch, fullbatch_arguments):
    run = launch(*fullbatch_arguments, prelude="import os; del os.environ['MASTER_ADDR']")
    assert run.code == 2 and len(run.errors) == 1 and "MASTER_ADDR is not set: " in run.errors[0], run.output


SAVES_AND_DIES = """
import os, signal
from megatron.core.dist_checkpointing.strategies import filesystem_async
from hrm_megatron.training.restarts import end_helpers_with_their_rank
said, pipe = os.pipe()
rank = os.fork()
if not rank:
    os.dup2(pipe, 1)  # which every process inherits, however it is started
    os.closerange(said, pipe + 1)
    end_helpers_with_their_rank(in_background=False)
    os.write(1, str(filesystem_async.get_write_results_queue()._manager._process.pid).encode())
    os.kill(os.getpid(), signal.SIGKILL)
os.close(pipe)
print("ended by", os.WTERMSIG(os.waitpid(rank, 0)[1]))
print("helper", os.fdopen(said).read())  # to the end
raise SystemExit
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_no_process_outlives_a_rank_that_is_killed(launch):
    """The pipe is closed when the last process that holds it has ended: without the end of the helper this waits."""
    run = launch(prelude=SAVES_AND_DIES, timeout_seconds=60)
    assert run.code == 0 and re.fullmatch(r"ended by 9\nhelper \d+\n", run.output), run.output


TOLD_TO_STOP = """
import os, signal
from hrm_megatron.training.restarts import STOPPING, results_queue
queue = results_queue("{mode}")
for number in STOPPING:
    os.kill(queue._manager._process.pid, number)
queue.put("a save")
print("helper still gives", queue.get())
raise SystemExit
"""


@pytest.mark.parametrize("mode", ["fork", "spawn"])  # without a GPU, and with one
def test_the_save_with_which_a_rank_ends_finds_its_helper(launch, mode):
    """torchrun and Slurm tell all processes of a rank to stop, also what the rank needs to save; a signal is delivered
    before the helper can answer."""
    run = launch(prelude=TOLD_TO_STOP.format(mode=mode), timeout_seconds=60)
    assert run.code == 0 and "helper still gives a save" in run.output, run.output


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_the_writer_in_the_background_outlives_a_signal_and_not_its_rank(tmp_path):
    """Megatron's own process and the server that forks it, as on a GPU; a rank that waits for it does not end."""
    rank = subprocess.run([sys.executable, "-m", "tests.training.background_writer", tmp_path], cwd=ROOT,
                          capture_output=True, text=True, start_new_session=True, timeout=250)
    assert rank.returncode == 3, rank.stdout + rank.stderr[-3000:]
    assert rank.stdout.split() == ["first", "SIGTERM", "second", "fails"], rank.stdout
    assert {"first", "second"} <= {path.name for path in tmp_path.iterdir()}
