"""A rank of a training run that kills itself where a plan says, each time once: the program torchrun starts.

KILLS is a list of [moment, step, rank], in the order in which they come; rank -1: every rank. FIRED is a folder in
which each leaves a file. The moments: "step", as a step begins; "save", behind a tensor of a save; "load", as a start
reads a checkpoint.
"""
from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

KILLS: list[tuple[str, int, int]] = [tuple(kill) for kill in json.loads(os.environ["KILLS"])]
FIRED, RANK = Path(os.environ["FIRED"]), int(os.environ["RANK"])


def reach(moment: str, step: int) -> None:
    """Die if that is what the first kill which has not happened says."""
    happened = {int(path.name.split(".")[0]) for path in FIRED.iterdir()}
    number = next((number for number in range(len(KILLS)) if number not in happened or (
        KILLS[number][2] == -1 and not (FIRED / f"{number}.{RANK}").exists())), None)
    if number is None:
        return
    when, at, rank = KILLS[number]
    if when == moment and (moment == "load" or step == at) and rank in (-1, RANK):
        (FIRED / f"{number}.{RANK}").touch()
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    from hrm_megatron import pretrain  # isort: skip  # before Megatron
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
    from megatron.training import training

    from hrm_megatron.training.step import TrainingStep

    forward, write, load = TrainingStep.forward, FileSystemWriterAsync.prepare_write_data, training.load_checkpoint
    running: list[TrainingStep] = []

    def killed_forward(self: TrainingStep, *arguments: Any) -> Any:
        running[:] = [self]
        reach("step", self.running_step())
        return forward(self, *arguments)

    def killed_write(*arguments: Any, **options: Any) -> Any:
        reach("save", running[0].running_step())
        return write(*arguments, **options)

    def killed_load(*arguments: Any, **options: Any) -> Any:
        reach("load", 0)
        return load(*arguments, **options)
    TrainingStep.forward = killed_forward  # type: ignore[method-assign]
    FileSystemWriterAsync.prepare_write_data = killed_write
    training.load_checkpoint = killed_load
    pretrain.main()


if __name__ == "__main__":
    main()
