"""One task of srun, told of a time limit by SIGUSR1: `python -m hrm_megatron.cluster.node --logs DIR -- torchrun ...`.

torchrun passes on SIGTERM alone, and kills its ranks 30 seconds later; a save takes longer. So SIGUSR1 goes to the
ranks themselves, where Megatron's `--exit-signal-handler --exit-signal SIGUSR1` saves behind the running step. Until
that listens the signal is ignored, which children inherit; the batch script repeats it.
"""
from __future__ import annotations

import argparse
import contextlib
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

import psutil


def node_name() -> str:
    """Return Slurm's name of this node, by which nodes are excluded."""
    return os.environ.get("SLURMD_NODENAME") or platform.node()


def run_torchrun(command: Sequence[str], logs: Path | None) -> int:
    """Run a node's torchrun with a log of each rank in `logs`, and return its exit code."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    launcher, *rest = command
    if logs is not None:
        own = logs / node_name()
        own.mkdir(parents=True, exist_ok=True)
        rest = ["--log-dir", str(own), "--redirects", "3", "--tee", "3", *rest]
        environment.setdefault("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE", "${rank}: ")
    return _run([launcher, *rest], environment, psutil.Process.children)


def run_rank(command: Sequence[str], logs: Path | None) -> int:
    """Run the rank that Slurm numbered, with what torchrun would have set, and its logs in `logs`."""
    slurm = os.environ
    environment = {"OMP_NUM_THREADS": "1", **slurm, "PYTHONUNBUFFERED": "1", "RANK": slurm["SLURM_PROCID"],
                   "LOCAL_RANK": slurm["SLURM_LOCALID"], "WORLD_SIZE": slurm["SLURM_STEP_NUM_TASKS"],
                   "LOCAL_WORLD_SIZE": slurm["SLURM_STEP_TASKS_PER_NODE"].split("(")[0]}
    if logs is None:
        return _run(command, environment, lambda rank: [rank])
    own = logs / node_name() / slurm["SLURM_LOCALID"]
    own.mkdir(parents=True, exist_ok=True)
    environment["TORCHELASTIC_ERROR_FILE"] = str(own / "error.json")
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # of srun, for all processes of a task
    with (subprocess.Popen(["tee", own / "stdout.log"], stdin=subprocess.PIPE) as out,
          subprocess.Popen(["tee", own / "stderr.log"], stdin=subprocess.PIPE, stdout=sys.stderr.fileno()) as err):
        return _run(command, environment, lambda rank: [rank], out.stdin, err.stdin)


def _run(command: Sequence[str], environment: dict[str, str],
         ranks_of: Callable[[psutil.Process], list[psutil.Process]],
         out: IO[bytes] | None = None, err: IO[bytes] | None = None) -> int:
    told: set[int] = set()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    with subprocess.Popen(command, env=environment, stdout=out, stderr=err) as launched:
        def to_ranks(number: int, frame: FrameType | None) -> None:
            with contextlib.suppress(psutil.NoSuchProcess):
                for rank in ranks_of(psutil.Process(launched.pid)):
                    # Once, since Python gives up its handlers before it ends: a second signal would kill it then.
                    if rank.pid not in told and catches(rank.pid, number):
                        told.add(rank.pid)
                        rank.send_signal(number)

        def to_launched(number: int, frame: FrameType | None) -> None:
            launched.send_signal(number)

        signal.signal(signal.SIGUSR1, to_ranks)
        signal.signal(signal.SIGTERM, to_launched)
        code = launched.wait()
    return code if code >= 0 else 128 - code


def catches(pid: int, number: int) -> bool:
    """Tell whether a process has a handler for a signal (proc(5), SigCgt)."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has ended
        return False
    caught = next(line.split()[1] for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(caught, 16) >> (number - 1) & 1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m hrm_megatron.cluster.node", description=__doc__)
    parser.add_argument("--logs", type=Path, help="folder of this start; a folder for each node and rank goes there")
    parser.add_argument("--rank", action="store_true", help="the command is a rank, which Slurm numbers, not torchrun")
    parser.add_argument("command", nargs="+", help="what to run, after --")
    arguments = parser.parse_args()
    run = run_rank if arguments.rank else run_torchrun
    sys.exit(run(arguments.command, arguments.logs))


if __name__ == "__main__":
    main()
