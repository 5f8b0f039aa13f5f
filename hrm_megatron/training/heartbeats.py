"""What each rank of a run says of itself from time to time, and which of them a run that hangs waits for.

One small file for each rank, below the folder of the run: it needs no collective, and no rank that others depend on.
A rank says how long ago it got on by its own clock, and a count that grows as long as its process runs, so that clocks
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
ORDER = (START, LOAD, READING, FORWARD, BETWEEN, GRADIENTS, OPTIMIZER, LOGS, EVALUATION, SAVE)  # in a step
MOST_NAMED = 8
READS = 3  # of a file that its rank replaces meanwhile, of which NFS says that it is stale
BACKSTOP = 1.5  # timeouts after which C code ends a rank whose own watchdog cannot run


@dataclass(frozen=True)
class Beat:
    """Where a rank was when it last said so; `idle_seconds` since it began that phase."""

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
    """Read what every rank last said; None for one that has said nothing."""
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
    """Tell whether a rank has said anything in between."""
    return now is not None and (before is None or now.count > before.count)


def silent_ranks(before: Sequence[Beat | None], now: Sequence[Beat | None]) -> list[int]:
    """Return the ranks that the others wait for; none where all are in one place, which shows no difference.

    First those whose process says nothing any more; then those that read data, which waits for no other rank; then
    those that are furthest behind.
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
    """Name the silent ranks in one line, and where the others wait."""
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
