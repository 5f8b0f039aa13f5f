"""The starts of a run under Slurm, recorded in a file of its folder, and the rules that decide whether it is
requeued."""
from __future__ import annotations

import itertools
import json
import re
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hrm_megatron.checkpoint.manifest import ARGUMENTS_FILE, TRACKER_FILE
from hrm_megatron.cluster.failures import FAILED, REFUSED, WENT_BACK
from hrm_megatron.config import ConfigError
from hrm_megatron.program import write_aside

ATTEMPTS_FILE, EXCLUDED_FILE = "attempts.json", "excluded.json"
# Files that training writes:
EARLY_STOPPING_FILE, EVALUATED_FILE = "early_stopping.json", "evaluated.json"
RETURN_FILE = "went_back.json"
MATCHED = re.compile(r"^match_flops_of \.+ (?!None$).*^train_iters \.+ (\d+)$", re.MULTILINE | re.DOTALL)  # sorted

# How an attempt ended, besides the outcomes of a failed launch. LOST: its end was not recorded, e.g. because the node
# of the batch script died. CANCELLED: also preempted, or a node was lost; Slurm itself decides whether to requeue the
# job.
RUNNING, FINISHED, LIMIT, ENDED, BAD_NODE, LOST, CANCELLED = (
    "running", "finished", "time limit", "ended early", "bad node", "lost", "stopped by Slurm")
FAILURES = (FAILED, BAD_NODE, LOST)
# A job that keeps failing but saves a step each time is stopped after A_DAY x MAX_FAILURES failures within a day: 20 by
# default, while 1,024 GPUs are expected to fail 3 times (planner/goodput.py: GPU_MTTF_HOURS).
DAY_SECONDS, A_DAY = 24 * 3600, 4


@dataclass(frozen=True)
class Attempt:
    """One start of a job: `first_step` and `last_step` are the latest saved steps when it began and when it ended.

    `ended` is the time of its end in seconds since 1970; 0: still running, or not recorded. `returned` is the time of
    the run's latest rollback by --ckpt-step when this start began; `went_back`: it rolled back itself, so its steps are
    not comparable with earlier ones.
    """

    job: str
    restart: int
    nodes: tuple[str, ...]
    first_step: int
    last_step: int
    end: str = RUNNING
    why: str = ""
    ended: float = 0.0
    returned: str = ""
    went_back: bool = False

    @property
    def saved(self) -> bool:
        return self.went_back or self.last_step > self.first_step


@dataclass(frozen=True)
class Verdict:
    """The batch script's next action, and the reason in one line."""

    action: str
    why: str


GO, REQUEUE, DONE, STOP = "go", "requeue", "done", "stop"


def decide(attempts: list[Attempt], most_failures: int) -> Verdict:
    """Decide whether the job of the last attempt, which has ended, is requeued."""
    last = attempts[-1]
    mine = [attempt for attempt in attempts if attempt.job == last.job]
    if last.end == FINISHED:
        return Verdict(DONE, f"done at step {last.last_step}")
    if last.end in (REFUSED, CANCELLED):
        return Verdict(STOP, f"{last.end}{f': {last.why}' if last.why else ''}")
    # Attempts that ended because of a bad node do not count.
    trained = [attempt for attempt in mine if attempt.end != BAD_NODE]
    if trained == [last] and last.end == ENDED and last.last_step == last.first_step and not last.went_back:
        return Verdict(DONE, f"ended well and saved no step after {last.last_step} (--skip-train, --print-config and "
                             "the like): not queued again")
    # A rollback skips more rows than the one before and limits its own number; one by --ckpt-step happens once.
    returns = last.end in (BAD_NODE, WENT_BACK) or last.went_back
    if not returns and len(trained) > 1 and last.last_step <= trained[-2].last_step:
        return Verdict(STOP, f"no progress: step {last.last_step} was the last one saved when attempt "
                             f"{trained[-2].restart} ended ({trained[-2].end}), and still is after attempt "
                             f"{last.restart} ({last.end})")
    in_a_row = _failures(itertools.takewhile(lambda attempt: not attempt.saved, reversed(mine)))
    in_a_day = _failures(attempt for attempt in mine if attempt.ended > last.ended - DAY_SECONDS)
    too_many = (f"{in_a_row} failures without a new save, {most_failures} are allowed (MAX_FAILURES)"
                if in_a_row > most_failures else
                f"{in_a_day} failures within 24 hours, {A_DAY * most_failures} are allowed ({A_DAY} x MAX_FAILURES)"
                if in_a_day > A_DAY * most_failures else None)
    if last.end in FAILURES and too_many:
        return Verdict(STOP, f"{too_many}, the last one: {last.end}{f': {last.why}' if last.why else ''}")
    return Verdict(REQUEUE, f"{last.end}, goes on after step {last.last_step}")


def _failures(attempts: Iterable[Attempt]) -> int:
    return sum(attempt.end in FAILURES for attempt in attempts)


def how_it_ended(code: int, outcome: str, done: bool, signalled: bool) -> str:
    """Return how a launch with exit code `code` ended; `outcome` is that of a failed one, `signalled`: it was signalled
    at the time limit."""
    if code == 0:
        return FINISHED if done else LIMIT if signalled else ENDED
    return LIMIT if signalled and outcome == FAILED else outcome


def is_done(checkpoints: Path, first_step: int | None, last_step: int, train_iters: int) -> bool:
    """Whether a run that exited with code 0 after `last_step` is complete: at `train_iters` (or the number of steps
    that --match-flops-of makes of it), or where early stopping ended it.

    Its last evaluation must be done, too. A start that began at that step (`first_step`) had only the missing
    evaluation to run, so another start could do no more; None: this start may have done nothing.
    """
    if last_step not in (first_step, _entry(checkpoints / EVALUATED_FILE, "iteration")):
        return False
    stopped = _entry(checkpoints / EARLY_STOPPING_FILE, "stopped")
    try:
        matched = MATCHED.search((checkpoints / ARGUMENTS_FILE).read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        matched = None
    return last_step == stopped or last_step >= (int(matched[1]) if matched else train_iters)


def _entry(place: Path, name: str) -> Any:
    try:
        return json.loads(place.read_text(encoding="utf-8")).get(name)
    except (FileNotFoundError, ValueError, AttributeError):  # training refuses or rewrites a damaged file
        return None


def saved_step(checkpoints: Path) -> int:
    """Return the step of the latest complete checkpoint, 0 before the first."""
    place = checkpoints / TRACKER_FILE
    try:
        return int(place.read_text())
    except FileNotFoundError:
        return 0
    except ValueError as error:
        raise ConfigError(f"{place}: holds no step; put the number of the latest complete iteration there") from error


class History:
    """The attempts of a run and its excluded nodes, kept in `folder`; `checkpoints` is the run's --save, to detect
    rollbacks."""

    def __init__(self, folder: Path, checkpoints: Path | None = None) -> None:
        self.folder = folder
        self.returned = str(_entry(checkpoints / RETURN_FILE, "time") or "") if checkpoints else ""
        entries: list[dict[str, Any]] = _read(folder / ATTEMPTS_FILE, [])
        self.attempts = [Attempt(**{**entry, "nodes": tuple(entry["nodes"])}) for entry in entries]
        self.excluded: dict[str, str] = _read(folder / EXCLUDED_FILE, {})  # node > why

    def begin(self, attempt: Attempt) -> list[Attempt]:
        """Record a start, and mark as lost all whose end was not recorded; return the attempts up to the last lost one
        of this job."""
        lost: list[Attempt] = []
        for one in [one for one in self.attempts if one.end == RUNNING]:
            ended = self.end(one.job, one.restart, LOST, attempt.first_step, "node failure, or killed")
            lost = ended if one.job == attempt.job else lost
        self.attempts.append(replace(attempt, returned=self.returned))
        self._write()
        return lost

    def up_to(self, job: str, restart: int) -> list[Attempt]:
        """Return the attempts up to this one; attempts of other jobs may follow it."""
        for count in range(len(self.attempts), 0, -1):
            if (self.attempts[count - 1].job, self.attempts[count - 1].restart) == (job, restart):
                return self.attempts[:count]
        raise ConfigError(f"{self.folder / ATTEMPTS_FILE}: start {restart} of job {job} is not in it; is --save kept "
                          "between two commands, and mounted in the container (MOUNTS)?")

    def went_back_in(self, attempt: Attempt) -> bool:
        """Whether the run has rolled back since this start began."""
        return self.returned != attempt.returned

    def end(self, job: str, restart: int, end: str, last_step: int, why: str = "") -> list[Attempt]:
        """Record how a start ended; return the attempts up to it."""
        ended = self.up_to(job, restart)
        ended[-1] = replace(ended[-1], end=end, last_step=last_step, why=why, ended=time.time(),
                            went_back=self.went_back_in(ended[-1]))
        self.attempts[:len(ended)] = ended
        self._write()
        return ended

    def exclude(self, nodes: dict[str, str]) -> None:
        """Record nodes to exclude, and why; delete a node's line from the file when it is repaired."""
        self.excluded |= nodes
        self.folder.mkdir(parents=True, exist_ok=True)
        write_aside(self.folder / EXCLUDED_FILE, json.dumps(self.excluded, indent=1) + "\n")

    def _write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_aside(self.folder / ATTEMPTS_FILE, json.dumps([asdict(one) for one in self.attempts], indent=1) + "\n")


def _read[T](place: Path, nothing: T) -> T:
    try:
        found: T = json.loads(place.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return nothing
    except ValueError as error:
        raise ConfigError(f"{place}: damaged ({error}); mend or delete it") from error
    return found
