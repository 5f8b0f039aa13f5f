"""Heartbeat files of all ranks, and the decision which rank a hanging run waits for.

Each rank writes one small file in the run's folder, so no collective and no coordinating rank is needed. A beat holds
the time since the rank's last progress, by its own clock, and a count that grows while its process runs, so the clocks
of nodes may differ.
"""
from __future__ import annotations

import errno
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hrm_megatron.program import write_aside

START, READING, FORWARD, BETWEEN, GRADIENTS, OPTIMIZER, LOGS, EVALUATION, LOAD, SAVE = (
    "start", "reading data", "forward", "backward, or waiting for a stage", "reduction of gradients", "optimizer",
    "logs", "evaluation", "load", "save")
ORDER = (START, LOAD, READING, FORWARD, BETWEEN, GRADIENTS, OPTIMIZER, LOGS, EVALUATION, SAVE)  # within a step
MOST_NAMED = 8
READS = 3  # attempts: NFS reports ESTALE if the rank replaces the file meanwhile
BACKSTOP = 1.5  # in timeouts; then faulthandler's C thread ends a rank whose watchdog cannot run


@dataclass(frozen=True)
class Beat:
    """A rank's position at its last heartbeat; `idle_seconds`: time since it entered that phase."""

    rank: int
    node: str
    count: int
    step: int
    phase: str
    idle_seconds: float

    @property
    def place(self) -> tuple[int, int]:
        return self.step, ORDER.index(self.phase)


def write_beat(folder: Path, beat: Beat) -> None:
    write_aside(folder / f"rank-{beat.rank}.json", json.dumps(asdict(beat)))


def read_beats(folder: Path, ranks: int) -> list[Beat | None]:
    """Return the last beat of every rank, None for a rank without one."""
    return [_read_beat(folder / f"rank-{rank}.json") for rank in range(ranks)]


def _read_beat(file: Path, reads: int = READS) -> Beat | None:
    try:
        return Beat(**json.loads(file.read_text()))
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno != errno.ESTALE or reads == 1:
            raise
        return _read_beat(file, reads - 1)


def answers(before: Beat | None, now: Beat | None) -> bool:
    """Tell whether a rank has written a beat between the two reads."""
    return now is not None and (before is None or now.count > before.count)


def silent_ranks(before: Sequence[Beat | None], now: Sequence[Beat | None]) -> list[int]:
    """Return the ranks that the others wait for; none if all are at the same point.

    These are the ranks that no longer write beats; if there are none, those that are reading data, since they wait for
    no other rank; otherwise those furthest behind.
    """
    if dead := [rank for rank, beat in enumerate(now) if not answers(before[rank], beat)]:
        return dead
    beats = [beat for beat in now if beat]
    found = [beat.rank for beat in beats if beat.phase == READING]
    if not found:
        least = min(beat.place for beat in beats)
        found = [beat.rank for beat in beats if beat.place == least]
    return found if len(found) < len(beats) else []


def describe_hang(before: Sequence[Beat | None], now: Sequence[Beat | None]) -> str:
    """Return one line that names the silent ranks, and where the others wait."""
    silent = silent_ranks(before, now)
    others = sorted({f"'{beat.phase}' of step {beat.step}" for beat in now if beat and beat.rank not in silent})
    waiting = " or ".join(others)
    if not silent:
        longest = max((beat for beat in now if beat), key=lambda beat: beat.idle_seconds)
        return (f"all {len(now)} ranks are in {waiting}, rank {longest.rank} on {longest.node} for longest, "
                f"{longest.idle_seconds:.0f} s")
    said = [_describe(rank, now[rank], answers(before[rank], now[rank])) for rank in silent[:MOST_NAMED]]
    more = f"; and {len(silent) - MOST_NAMED} more" if len(silent) > MOST_NAMED else ""
    rest = f"all others are in {waiting}" if others else "no rank answers"
    return f"{'; '.join(said)}{more}; {rest}"


def _describe(rank: int, beat: Beat | None, alive: bool) -> str:
    if beat is None:
        return f"rank {rank} has said nothing since the start"
    if not alive:
        return (f"rank {rank} on {beat.node} does not answer, last heard of in step {beat.step} in '{beat.phase}': its "
                "process is stopped, dead, or held by code outside of Python")
    return f"rank {rank} on {beat.node} is silent since step {beat.step} in '{beat.phase}'"
