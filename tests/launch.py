"""Ranks of training runs, forked from one process that has imported Megatron already: seconds less for every run.

Run as a program it reads orders, one JSON object per line, and answers each with the exit codes of its ranks.
`Launcher` is the other side. What a rank does is hrm_megatron.pretrain.main() with the order's arguments.
"""
from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from tests.forked import run_and_exit
from tests.ports import free_port

GRACE_SECONDS = 5


@dataclass(frozen=True)
class Run:
    """How a run ended: the exit code of the first rank that failed (negative: its signal), what rank 0 said, and the
    last rank, to which Megatron leaves the lines about iterations."""

    code: int
    output: str
    last_output: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.output.splitlines() if line.startswith("error: ")]


class Launcher:
    """Start runs of `hrm_megatron.pretrain`, one after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runs = folder, 0
        self.process = subprocess.Popen([sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True, cwd=Path(__file__).parents[1])

    def __call__(self, *arguments: object, ranks: int = 1, prelude: str = "", timeout_seconds: float = 240,
                 grace_seconds: float = GRACE_SECONDS) -> Run:
        """Train with these arguments on so many ranks; `prelude` is run in every rank before. Once one has failed, the
        others have `grace_seconds` to say why."""
        self.runs += 1
        log = self.folder / f"run{self.runs}"
        order = dict(arguments=[str(a) for a in arguments], ranks=ranks, prelude=prelude, log=str(log),
                     timeout_seconds=timeout_seconds, grace_seconds=grace_seconds)
        assert self.process.stdin and self.process.stdout
        print(json.dumps(order), file=self.process.stdin, flush=True)
        codes = json.loads(self.process.stdout.readline())
        first, last = (Path(f"{log}.{rank}").read_text(errors="replace") for rank in (0, ranks - 1))
        return Run(next((code for code in codes if code), 0), first, last)

    def close(self) -> None:
        self.process.kill()  # its input may stay open in some process that was forked here
        self.process.communicate()


def _be_rank(rank: int, order: dict, port: int) -> None:
    os.setpgid(0, 0)
    log = os.open(f"{order['log']}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(order["ranks"]), MASTER_ADDR="127.0.0.1",
                      LOCAL_WORLD_SIZE=str(order["ranks"]), MASTER_PORT=str(port))
    from hrm_megatron import pretrain
    from hrm_megatron.parallel.connections import choose_connections

    pretrain.SECONDS_BEHIND_RANK_0 = 1  # all have the time to end by themselves
    sys.argv = ["pretrain", *order["arguments"]]
    choose_connections(order["arguments"])  # pretrain was imported before these were known
    exec(order["prelude"], {})
    pretrain.main()


def _run(order: dict) -> list[int]:
    """Fork the ranks and return their exit codes in the order in which they ended."""
    port = free_port()
    running: set[int] = set()
    ranks: list[int] = []
    for rank in range(order["ranks"]):
        pid = os.fork()
        if not pid:
            run_and_exit(functools.partial(_be_rank, rank, order, port))
        running.add(pid)
        ranks.append(pid)
    codes: list[int] = []
    deadline = time.monotonic() + order["timeout_seconds"]
    while running:
        for pid in sorted(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                running.remove(pid)
                codes.append(os.waitstatus_to_exitcode(status))
                if codes[-1]:
                    deadline = min(deadline, time.monotonic() + order["grace_seconds"])
        if time.monotonic() > deadline:
            for pid in running:
                os.killpg(pid, signal.SIGKILL)
        time.sleep(0.01)
    for pid in ranks:  # a killed rank leaves the processes that it had started
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    return codes


def prepare() -> None:
    """Import, compile and read here what every rank would: two thirds of a short run. None of it may start a thread."""
    gc.disable()
    importlib.import_module("hrm_megatron.pretrain")  # before Megatron
    importlib.import_module("torch.utils.tensorboard")
    import numpy as np
    from megatron.training.argument_utils import ArgumentGroupFactory

    from hrm_megatron.data.plan import warm_up
    from hrm_megatron.training.own_flags import full_parser

    os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"  # of pyarrow, which extensions of numba may import
    warm_up(np.dtype(np.uint32))
    factory = object.__new__(ArgumentGroupFactory)
    read_help = functools.cache(factory._get_field_docstrings)  # out of Megatron's sources, for each parser anew
    ArgumentGroupFactory._get_field_docstrings = lambda _, config: read_help(config)
    full_parser()
    tasks = Path("/proc/self/task")  # those of libraries too, where the system says so
    assert threading.active_count() == 1 and (not tasks.exists() or len([*tasks.iterdir()]) == 1)
    gc.freeze()  # no rank goes through all of this, which would also copy it
    gc.enable()


def main() -> None:
    prepare()
    for line in sys.stdin:
        print(json.dumps(_run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
