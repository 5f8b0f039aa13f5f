"""Ranks killed at any moment: torchrun starts the run again, and it ends bitwise as if nothing had happened."""
from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from hrm_megatron.checkpoint.folders import find_iteration
from tests.training.conftest import scalars
from tests.training.test_resume import tensors_that_differ

ROOT = Path(__file__).parents[2]
STEPS, SAVE_INTERVAL = 24, 3
KILLS = int(os.environ.get("HRM_KILLS", "12"))  # of each layout
MOMENTS = ("step", "save", "load")
LAYOUTS = {"DP2": (2, ()), "TP2-PP2": (4, ("--tensor-model-parallel-size", 2, "--pipeline-model-parallel-size", 2))}


def plan(ranks: int, seed: int) -> list[tuple[str, int, int]]:
    """Draw moments and ranks, in the order of steps; every second kill is of all ranks."""
    rng = random.Random(seed)
    kills = []
    for number, step in enumerate(sorted(rng.choices(range(1, STEPS + 1), k=KILLS))):
        moment = MOMENTS[number % len(MOMENTS)] if number else "step"
        at = -(-step // SAVE_INTERVAL) * SAVE_INTERVAL if moment == "save" else step
        kills.append((moment, at, rng.randrange(ranks) if number % 2 else -1))
    return sorted(kills, key=lambda kill: kill[1])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_survives_its_kills(launch, fullbatch_arguments, native_start, tmp_path, layout, capsys):
    ranks, flags = LAYOUTS[layout]
    arguments = [*fullbatch_arguments, *flags, "--save-interval", SAVE_INTERVAL]
    for name in "ab":
        shutil.copytree(native_start, tmp_path / name)
    undisturbed = launch(*arguments, "--load", tmp_path / "a", "--save", tmp_path / "a", "--tensorboard-dir",
                         tmp_path / "a_log", ranks=ranks)
    assert undisturbed.code == 0, undisturbed.output[-3000:]
    kills, fired = plan(ranks, seed=ranks), tmp_path / "fired"
    fired.mkdir()
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
         "--max-restarts", str(len(kills) * ranks), "-m",  # of a kill of all, some may die at the start that follows
          "tests.training.killed_rank", *map(str, arguments), "--load",
         tmp_path / "b", "--save", tmp_path / "b", "--tensorboard-dir", tmp_path / "b_log"],
        cwd=ROOT, capture_output=True, text=True, env=os.environ | dict(
            TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
            KILLS=json.dumps(kills), FIRED=str(fired), OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT)))
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-5000:]
    happened = Counter(kills[int(number)][0] for number in {path.name.split(".")[0] for path in fired.iterdir()})
    starts = [int(step) for step in re.findall(r"^schedule: steps (\d+) to", said, re.MULTILINE)]
    with capsys.disabled():
        print(f"\n{layout}: {sum(happened.values())} of {len(kills)} kills survived: {dict(happened)}; starts at steps "
              f"{' '.join(map(str, starts))}")
    assert sum(happened.values()) == len(kills)
    ends = [find_iteration(tmp_path / name) for name in "ab"]
    assert ends[0].name == ends[1].name == f"iter_{STEPS:07d}" and not tensors_that_differ(*ends)
    assert scalars(tmp_path / "a_log") == scalars(tmp_path / "b_log")
    # Nothing older than the last save was made again: a start is never further back than the kill before it allows.
    assert starts == sorted(starts) and {(start - 1) % SAVE_INTERVAL for start in starts} == {0}


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
from hrm_megatron.parallel.cpu import activate
activate()
import os, signal
from megatron.core.dist_checkpointing.strategies import filesystem_async
from hrm_megatron.training.restarts import end_helpers_with_their_rank
end_helpers_with_their_rank()
queue = filesystem_async.get_write_results_queue()
print(queue._manager._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_no_process_outlives_a_rank_that_is_killed():
    """The pipe is closed when the last process that holds it has ended: without the end of the helper this waits."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", SAVES_AND_DIES], cwd=ROOT, capture_output=True,
                          text=True, timeout=100)
    assert done.returncode == -signal.SIGKILL and int(done.stdout), done.stderr
