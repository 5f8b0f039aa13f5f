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
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

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
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    with subprocess.Popen([launcher, *rest], env=environment) as torchrun:
        def to_ranks(number: int, frame: FrameType | None) -> None:
            with contextlib.suppress(psutil.NoSuchProcess):
                for child in psutil.Process(torchrun.pid).children():
                    with contextlib.suppress(psutil.NoSuchProcess):
                        child.send_signal(number)

        def to_torchrun(number: int, frame: FrameType | None) -> None:
            torchrun.send_signal(number)

        signal.signal(signal.SIGUSR1, to_ranks)
        signal.signal(signal.SIGTERM, to_torchrun)
        code = torchrun.wait()
    return code if code >= 0 else 128 - code


def become_rank(command: list[str], logs: Path | None) -> None:
    """Turn this task into the rank that Slurm numbered, with what torchrun would have set, and its logs in `logs`."""
    slurm = os.environ
    rank = slurm["SLURM_PROCID"]
    os.environ.update(RANK=rank, LOCAL_RANK=slurm["SLURM_LOCALID"], WORLD_SIZE=slurm["SLURM_STEP_NUM_TASKS"],
                      LOCAL_WORLD_SIZE=slurm["SLURM_STEP_TASKS_PER_NODE"].split("(")[0], PYTHONUNBUFFERED="1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if logs is not None:
        own = logs / node_name() / slurm["SLURM_LOCALID"]
        own.mkdir(parents=True, exist_ok=True)
        os.environ["TORCHELASTIC_ERROR_FILE"] = str(own / "error.json")
        for stream, name in ((sys.stdout, "stdout.log"), (sys.stderr, "stderr.log")):
            tee = subprocess.Popen(["tee", own / name], stdin=subprocess.PIPE, stdout=stream.fileno())
            assert tee.stdin is not None
            os.dup2(tee.stdin.fileno(), stream.fileno())
    os.execvp(command[0], command)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m hrm_megatron.cluster.node", description=__doc__)
    parser.add_argument("--logs", type=Path, help="folder of this start; a folder for each node and rank goes there")
    parser.add_argument("--rank", action="store_true", help="the command is a rank, which Slurm numbers, not torchrun")
    parser.add_argument("command", nargs="+", help="what to run, after --")
    arguments = parser.parse_args()
    if arguments.rank:
        become_rank(arguments.command, arguments.logs)
    sys.exit(run_torchrun(arguments.command, arguments.logs))


if __name__ == "__main__":
    main()
