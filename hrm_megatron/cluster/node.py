"""One srun task, which passes SIGUSR1 (time limit) on to ranks: `python -m hrm_megatron.cluster.node --logs DIR --
torchrun ...`.

torchrun forwards only SIGTERM and kills its ranks 30 seconds later; a save takes longer. So SIGUSR1 is sent directly to
the ranks, where Megatron's `--exit-signal-handler --exit-signal SIGUSR1` saves after the current step. Until that
handler is installed the signal is ignored (children inherit this); the batch script repeats it.

Settings that depend on the machine are decided here, inside the container: open files and NUMA binding
(cluster/host.py).
"""
from __future__ import annotations

import argparse
import contextlib
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

import psutil

from hrm_megatron.cluster.failures import write_refusal
from hrm_megatron.cluster.host import node_name, numa_flags, raise_file_limit
from hrm_megatron.config import ConfigError


def run_torchrun(command: Sequence[str], logs: Path | None, numa_binding: str | None) -> int:
    """Run a node's torchrun with a log per rank in `logs`, and return its exit code."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    own = logs / node_name() if logs is not None else None
    with _refusing(own):
        _raise_file_limit(_ranks_of(command))
        binding = numa_flags(numa_binding)
    launcher, *rest = command
    if own is not None:
        own.mkdir(parents=True, exist_ok=True)
        rest = ["--log-dir", str(own), "--redirects", "3", "--tee", "3", *rest]
        environment.setdefault("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE", "${rank}: ")
    return _run([launcher, *binding, *rest], environment, psutil.Process.children)


def run_rank(command: Sequence[str], logs: Path | None) -> int:
    """Run one rank, numbered by Slurm, with the environment that torchrun would set and its logs in `logs`."""
    slurm = os.environ
    environment = {"OMP_NUM_THREADS": "1", **slurm, "PYTHONUNBUFFERED": "1", "RANK": slurm["SLURM_PROCID"],
                   "LOCAL_RANK": slurm["SLURM_LOCALID"], "WORLD_SIZE": slurm["SLURM_STEP_NUM_TASKS"],
                   "LOCAL_WORLD_SIZE": slurm["SLURM_STEP_TASKS_PER_NODE"].split("(")[0]}
    own = logs / node_name() / slurm["SLURM_LOCALID"] if logs is not None else None
    with _refusing(own):
        _raise_file_limit(int(slurm["SLURM_STEP_NUM_TASKS"]))
    if own is None:
        return _run(command, environment, lambda rank: [rank])
    own.mkdir(parents=True, exist_ok=True)
    environment["TORCHELASTIC_ERROR_FILE"] = str(own / "error.json")
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # srun sends it to all processes of a task
    with (subprocess.Popen(["tee", own / "stdout.log"], stdin=subprocess.PIPE) as out,
          subprocess.Popen(["tee", own / "stderr.log"], stdin=subprocess.PIPE, stdout=sys.stderr.fileno()) as err):
        return _run(command, environment, lambda rank: [rank], out.stdin, err.stdin)


@contextlib.contextmanager
def _refusing(own: Path | None) -> Iterator[None]:
    """Exit with one line on a ConfigError of the block; the error file written to `own` makes `python -m
    hrm_megatron.cluster end` stop the job."""
    try:
        yield
    except ConfigError as error:
        if own is not None:
            write_refusal(own, str(error))
        sys.exit(f"error: {error}")


def _raise_file_limit(ranks: int) -> None:
    if too_few := raise_file_limit(ranks):
        raise ConfigError(too_few)


def _ranks_of(torchrun: Sequence[str]) -> int:
    """Return the number of ranks on all nodes, as far as the command gives numbers."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--nnodes", default="1")
    parser.add_argument("--nproc-per-node", default="1")
    sizes = vars(parser.parse_known_args(torchrun)[0]).values()
    return math.prod(int(size) for size in sizes if size.isdecimal())


def _run(command: Sequence[str], environment: dict[str, str],
         ranks_of: Callable[[psutil.Process], list[psutil.Process]],
         out: IO[bytes] | None = None, err: IO[bytes] | None = None) -> int:
    told: set[int] = set()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    with subprocess.Popen(command, env=environment, stdout=out, stderr=err) as launched:
        def to_ranks(number: int, frame: FrameType | None) -> None:
            with contextlib.suppress(psutil.NoSuchProcess):
                for rank in ranks_of(psutil.Process(launched.pid)):
                    # Once: Python removes its handlers before it exits, and a second signal would then kill it.
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
    """Whether a process has a handler for a signal (proc(5), SigCgt)."""
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
    parser.add_argument("--numa-binding", help="torchrun's, or none (default: node, where that can be)")
    parser.add_argument("command", nargs="+", help="what to run, after --")
    arguments = parser.parse_args()
    sys.exit(run_rank(arguments.command, arguments.logs) if arguments.rank else
             run_torchrun(arguments.command, arguments.logs, arguments.numa_binding))


if __name__ == "__main__":
    main()
