"""A rank of a training run that kills itself, or its reader of data, where a plan says, each time once.

A plan is a list of (moment, step, rank) in the order in which they come; rank -1: every rank. The moments: "step", as a
step begins; "save", in the middle of the rank's file; "load", behind the first tensor that a start reads; "worker",
the process that reads data dies over a row of that step. As a program it is what torchrun starts.
"""
from __future__ import annotations

import functools
import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import psutil

MOMENTS = ("step", "save", "load", "worker")
ALL = -1
TENSORS_SAVED = 5  # of a file, before a kill in a save; TP 2 x PP 2 writes tens into each

Kill = tuple[str, int, int]


def draw_kills(count: int, ranks: int, steps: int, save_interval: int, seed: int) -> list[Kill]:
    """Draw steps and ranks, in the order of steps; every second kill, of each moment too, is of all ranks."""
    rng = random.Random(seed)
    kills = []
    for number, step in enumerate(sorted(rng.choices(range(1, steps + 1), k=count))):
        turn, place = divmod(number, len(MOMENTS))
        moment = MOMENTS[place]
        at = -(-step // save_interval) * save_interval if moment == "save" else step
        kills.append((moment, at, rng.randrange(ranks) if (turn + place) % 2 else ALL))
    return sorted(kills, key=lambda kill: kill[1])


def happened(folder: Path) -> set[int]:
    """The numbers of the kills of which each process has left a file."""
    return {int(path.name.partition(".")[0]) for path in (folder / "kills").iterdir()}


def lost_steps(folder: Path, kills: list[Kill], save_interval: int) -> list[tuple[int, int]]:
    """Starts that went on elsewhere than behind the last save before the kill: where, and where at the earliest.

    What reads data is up to a step ahead. A kill in a load comes where the one before has led.
    """
    found, earliest, wrong = (folder / "starts").read_text().split(), [1], []
    for moment, at, _ in kills:
        last = at - 1 - (moment == "worker")
        start = 1 if moment == "load" else 1 + last // save_interval * save_interval
        earliest.append(max(earliest[-1], start))
    for words in found:
        first, number = map(int, words.split(":"))
        if first < earliest[number] or (first - 1) % save_interval:
            wrong.append((first, earliest[number]))
    return wrong


def all_ranks(process: int) -> list[int]:
    """The processes of all ranks, which one launcher has started alike; this one last."""
    mine = psutil.Process(process)
    launcher = mine.parent()
    others = launcher.children() if launcher else []
    return [other.pid for other in others if other != mine and other.cmdline() == mine.cmdline()] + [process]


class Killer:
    """Kills its own process where `kills` say; `folder` says which of them have happened."""

    def __init__(self, kills: list[Kill], folder: Path, rank: int) -> None:
        self.kills, self.folder, self.rank = kills, folder, rank
        self.running: Any = None  # the step's object, once it runs
        self.process, self.saved = os.getpid(), 0
        (folder / "kills").mkdir(exist_ok=True)

    def reach(self, moment: str, step: int) -> None:
        """Kill who is meant, if that is what the first kill which has not happened says: readers of data one by one,
        since each comes to the row when it does, and all ranks at once."""
        done = happened(self.folder)
        number = next((number for number, (when, _, rank) in enumerate(self.kills) if number not in done or (
            when == "worker" and rank == ALL and not self.note(number).exists())), None)
        if number is None:
            return
        when, at, rank = self.kills[number]
        if when == moment and (moment == "load" or step == at) and rank in (ALL, self.rank):
            self.note(number).touch()
            if moment == "worker":
                os.kill(os.getpid(), signal.SIGKILL)
            for process in all_ranks(self.process) if rank == ALL else [self.process]:
                os.kill(process, signal.SIGKILL)

    def note(self, number: int) -> Path:
        return self.folder / "kills" / f"{number}.{self.rank}"

    def install(self) -> None:
        """Let the run pass by here; hrm_megatron.pretrain has been imported."""
        import torch
        from megatron.core.dist_checkpointing.strategies import filesystem_async
        from megatron.training.global_vars import get_args
        from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner

        from hrm_megatron.data.dataset import PackedRows
        from hrm_megatron.training import arguments
        from hrm_megatron.training.step import TrainingStep

        arguments.WITHOUT_CUDA["num_workers"] = 1  # else none without a GPU
        forward, row, write = TrainingStep.forward, PackedRows.__getitem__, filesystem_async._write_item
        commit = DefaultLoadPlanner.commit_tensor

        def forwards(step: TrainingStep, *rest: Any) -> Any:
            if self.running is None and self.rank == 0:
                with (self.folder / "starts").open("a") as starts:
                    starts.write(f"{step.running_step()}:{len(happened(self.folder))}\n")
            self.running = step
            self.reach("step", step.running_step())
            return forward(step, *rest)

        @functools.wraps(write)  # its callers look at its parameters
        def writes(*rest: Any, **options: Any) -> Any:
            self.saved += 1
            if self.saved % TENSORS_SAVED == 0:
                self.reach("save", self.running.running_step())
            return write(*rest, **options)

        def commits(*rest: Any) -> None:
            commit(*rest)
            self.reach("load", 0)

        def reads(rows: PackedRows, number: int) -> Any:
            if torch.utils.data.get_worker_info():
                self.reach("worker", number // get_args().global_batch_size + 1)
            return row(rows, number)
        TrainingStep.forward, PackedRows.__getitem__ = forwards, reads  # type: ignore[method-assign]
        filesystem_async._write_item, DefaultLoadPlanner.commit_tensor = writes, commits


def main() -> None:
    """KILLS is the plan, as JSON, and KILLED a folder for notes."""
    from hrm_megatron import pretrain

    kills = [(moment, step, rank) for moment, step, rank in json.loads(os.environ["KILLS"])]
    Killer(kills, Path(os.environ["KILLED"]), int(os.environ["RANK"])).install()
    pretrain.main()


if __name__ == "__main__":
    main()
