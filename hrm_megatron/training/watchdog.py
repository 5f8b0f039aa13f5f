"""Hanging ranks: dump all stack traces, name the silent rank, and end the run so that its launcher can restart it.

The main thread of a rank records its phase, a few assignments per step. A watchdog thread writes it to a file
(training/heartbeats.py) and checks how old it is. The first rank without progress for the timeout raises the alarm;
every rank that still runs then dumps its stacks, and one of them names the silent ranks.
"""
from __future__ import annotations

import argparse
import contextlib
import faulthandler
import logging
import os
import platform
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch
from megatron.training import training as megatron_training

from hrm_megatron.parallel.patching import around
from hrm_megatron.program import write_aside
from hrm_megatron.training import heartbeats
from hrm_megatron.training.error_file import OneLineErrors, RestartableError
from hrm_megatron.training.heartbeats import BACKSTOP, Beat, describe_hang, read_beats, write_beat
from hrm_megatron.training.step import TrainingStep

BEATS, STACKS, ALARM, VERDICT = "heartbeats", "stacks", "alarm", "verdict"
JUDGES = "judge", "judge.2"  # files, each with the rank that has this role; the second if the first has died
BEATS_IN_TIMEOUT = 20
GRACE_BEATS = 4  # beats between two reads of the others' beats; enough for each running rank to beat and dump stacks
EXIT_CODE = 1

log = logging.getLogger(__name__)


class HangError(RestartableError):
    """The error that torchrun repeats when a run has ended because of a hang."""


class Watchdog:
    """The current phase of this rank, and the thread that watches it."""

    def __init__(self, save: Path, timeout_seconds: float, running_step: Callable[[], int]) -> None:
        self.save, self.timeout_seconds, self.running_step = save, timeout_seconds, running_step
        self.interval_seconds = timeout_seconds / BEATS_IN_TIMEOUT
        self.phase, self.step, self.since, self.count = heartbeats.START, 0, time.monotonic(), 0
        self.ended = threading.Event()
        self.thread: threading.Thread | None = None

    def mark(self, phase: str) -> None:
        """Record that this rank has entered `phase`."""
        self.phase, self.step, self.since = phase, self.running_step(), time.monotonic()

    def begin(self) -> None:
        """Start the watchdog thread; all ranks call it together."""
        self.rank, self.ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        name = [uuid.uuid4().hex]
        torch.distributed.broadcast_object_list(name)  # ignore alarms of an earlier start
        self.folder = self.save / BEATS / name[0]
        if self.rank == 0:
            shutil.rmtree(self.save / BEATS, ignore_errors=True)
        torch.distributed.barrier()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.mark(heartbeats.START)
        self.thread = threading.Thread(target=self.look, daemon=True, name="watchdog")
        self.thread.start()

    def end(self) -> None:
        """Stop the watchdog thread at the end of the run."""
        self.ended.set()
        if self.thread:
            self.thread.join()
        faulthandler.cancel_dump_traceback_later()

    def look(self) -> None:
        """Write beats until the run ends or hangs."""
        awake, warned = time.monotonic(), False
        while not self.ended.is_set():
            now = time.monotonic()
            if now - awake > self.timeout_seconds / 2:  # the whole process was stopped, perhaps with all others
                self.since = now
            awake = now
            try:
                self.beat()
                if (self.folder / ALARM).exists() or now - self.since > self.timeout_seconds:
                    self.sound()
                warned = False
            except OSError as error:  # the run itself needs the storage only to save
                if not warned:
                    log.warning(f"hang: rank {self.rank} cannot write to {self.folder} ({error})")
                warned = True
                if now - self.since > self.timeout_seconds:
                    self.end_alone(error)
            self.ended.wait(self.interval_seconds)

    def beat(self) -> None:
        faulthandler.dump_traceback_later(self.timeout_seconds * BACKSTOP, exit=True, file=2)
        self.count += 1
        write_beat(self.folder, Beat(self.rank, platform.node(), self.count, self.step, self.phase,
                                     time.monotonic() - self.since))

    def beat_for(self, beats: int) -> None:
        for _ in range(beats):
            time.sleep(self.interval_seconds)
            self.beat()

    def sound(self) -> NoReturn:
        """Raise the alarm, dump stacks, find out who still writes beats, and exit."""
        (self.folder / ALARM).touch()
        self.dump()
        self.beat_for(GRACE_BEATS)  # then all running ranks have seen the alarm
        verdict = self.folder / VERDICT
        for role in JUDGES:  # few ranks: otherwise storage would serve ranks x ranks reads
            for _ in range(2 * GRACE_BEATS):
                if verdict.exists():
                    break
                if self.is_first(role):
                    self.judge(role)
                else:
                    self.beat_for(1)
        # The launcher kills all ranks once the first has ended.
        OneLineErrors(self.rank).record_exception(HangError(verdict.read_text() if verdict.exists() else "hang"))
        os._exit(EXIT_CODE)

    def is_first(self, role: str) -> bool:
        """Tell whether this rank is the first to take a role of a judge, or to take it after a judge has failed."""
        try:
            with (self.folder / role).open("x") as file:
                file.write(str(self.rank))
        except FileExistsError:
            return False
        return True

    def judge(self, role: str) -> None:
        """Write the verdict, which names the silent ranks; after an OSError another rank may do it."""
        try:
            before = read_beats(self.folder, self.ranks)
            if role != JUDGES[0] and (first := (self.folder / JUDGES[0]).read_text()):
                before[int(first)] = None  # counts as running: it answered the alarm, so its death is not the hang
            self.beat_for(GRACE_BEATS)
            silent = describe_hang(before, read_beats(self.folder, self.ranks))
            line = f"hang: {silent}; stacks of all that answer are in {self.save / STACKS}"
            print(line, file=sys.stderr, flush=True)
            write_aside(self.folder / VERDICT, line)
        except OSError:
            (self.folder / role).unlink(missing_ok=True)
            raise

    def end_alone(self, error: OSError) -> NoReturn:
        """Exit alone, since the ranks cannot share their phases; every other hanging rank does the same."""
        line = (f"hang: rank {self.rank} on {platform.node()} is in '{self.phase}' of step {self.step} for "
                f"{time.monotonic() - self.since:.0f} s, and cannot ask the others ({error})")
        faulthandler.dump_traceback(2)
        print(line, file=sys.stderr, flush=True)
        with contextlib.suppress(OSError):
            OneLineErrors(self.rank).record_exception(HangError(line))
        os._exit(EXIT_CODE)

    def dump(self) -> None:
        """Dump the stacks of all threads to a file and to stderr."""
        folder = self.save / STACKS
        folder.mkdir(exist_ok=True)
        partial = folder / f".rank-{self.rank}.txt.{uuid.uuid4().hex}"
        with partial.open("w") as file:
            file.write(f"rank {self.rank} on {platform.node()}, step {self.step}, '{self.phase}' for "
                       f"{time.monotonic() - self.since:.0f} s\n")
            file.flush()
            faulthandler.dump_traceback(file)
        partial.replace(folder / f"rank-{self.rank}.txt")
        faulthandler.dump_traceback(2)


def install_watchdog(args: argparse.Namespace, step: TrainingStep) -> Watchdog | None:
    """Let Megatron's loop and our step record a rank's phase; return None without --hang-timeout-minutes."""
    if args.hang_timeout_minutes is None:
        return None
    dog = Watchdog(Path(args.save), args.hang_timeout_minutes * 60, step.running_step)

    def marked(during: str, after: str) -> Callable[..., Any]:
        def run(stock: Callable[..., Any], *rest: Any, **options: Any) -> Any:
            dog.mark(during)
            try:
                return stock(*rest, **options)
            finally:
                dog.mark(after)
        return run
    for name, during, after in (("load_checkpoint", heartbeats.LOAD, heartbeats.START),
                                ("finalize_model_grads", heartbeats.GRADIENTS, heartbeats.OPTIMIZER),
                                ("training_log", heartbeats.LOGS, heartbeats.LOGS),
                                ("evaluate", heartbeats.EVALUATION, heartbeats.LOGS),
                                ("save_checkpoint", heartbeats.SAVE, heartbeats.LOGS)):
        setattr(megatron_training, name, around(getattr(megatron_training, name), marked(during, after)))
    read, forward = marked(heartbeats.READING, heartbeats.FORWARD), marked(heartbeats.FORWARD, heartbeats.BETWEEN)
    step.micro_batch = around(step.micro_batch, read)  # type: ignore[method-assign]
    step.forward = around(step.forward, forward)  # type: ignore[method-assign]
    return dog
