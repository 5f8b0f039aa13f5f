"""The curves of a run, read from its TensorBoard log."""
from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from tensorboard.backend.event_processing.directory_watcher import DirectoryDeletedError
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hrm_megatron.config import ConfigError
from hrm_megatron.monitoring.run_folder import RunFolder

ALL = {"scalars": 0}  # 0: keep every one


class Curve(NamedTuple):
    """Values by step, ascending, and when each was written (seconds since the epoch)."""

    steps: list[int]
    values: list[float]
    times: list[float]


class Log:
    """A log that may still grow: `curves` reads what is new. Of a step that was run twice the later one counts."""

    def __init__(self, folder: Path) -> None:
        logging.getLogger("tensorboard").setLevel(logging.ERROR)  # of each restart it says that steps come again
        self.folder, self.events = folder, EventAccumulator(str(folder), ALL)

    def curves(self) -> dict[str, Curve]:
        """Return all curves by name."""
        try:
            self.events.Reload()
        except DirectoryDeletedError as error:
            raise ConfigError(f"{self.folder}: is not there any more") from error
        found = {}
        for name in self.events.Tags()["scalars"]:
            in_order = sorted(self.events.Scalars(name), key=lambda event: event.wall_time)
            by_step = {event.step: event for event in in_order}
            events = [by_step[step] for step in sorted(by_step)]
            found[name] = Curve([event.step for event in events], [event.value for event in events],
                                [event.wall_time for event in events])
        return found


def read_curves(run: RunFolder) -> dict[str, Curve]:
    """Return the curves of a run, of which there must be some."""
    curves = Log(run.log).curves() if run.log else {}
    if not curves:
        raise ConfigError(f"{run.folder}: has no TensorBoard log with curves; train with --tensorboard-dir")
    return curves


def in_groups(names: Iterable[str], prefixes: Sequence[str]) -> list[str]:
    """Return the names that begin with one of these and a slash, ticks in their order."""
    found = [name for name in names if name.partition("/")[0] in prefixes]
    return sorted(found, key=lambda name: (name.partition("/")[0], tick_of(name)))


def tick_of(name: str) -> int:
    """Number of the tick that a curve is about, 0 if it is about none."""
    words = name.partition("/")[2].split()
    return int(words[1]) if len(words) > 1 and words[0] == "tick" and words[1].isdecimal() else 0
