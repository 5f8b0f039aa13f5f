"""The curves of a run, read from its TensorBoard log."""
from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

from hrm_megatron.config import ConfigError
from hrm_megatron.monitoring.run_folder import EVENT_FILES, RunFolder

LOSS = "lm loss"
BY_SAMPLES = " vs samples"  # suffix of curves whose x axis is samples, not steps
# A record of a log: length, CRC32C of the length, event, CRC32C of the event.
HEADER, FRAME_BYTES = struct.Struct("<QI"), 16


class Curve(NamedTuple):
    """Values by ascending step, and the time each was written (seconds since the epoch)."""

    steps: list[int]
    values: list[float]
    times: list[float]


class EventFile:
    """The event file of one start, which may still grow: `read` reads what is new."""

    def __init__(self, path: Path) -> None:
        self.path, self.loader = path, RawEventFileLoader(str(path))
        self.begun = 0.0  # seconds since the epoch
        self.read_bytes = 0
        self.curves: dict[str, Curve] = {}
        self.damage: str | None = None  # why the file was not read to its end

    def read(self) -> None:
        size = self.path.stat().st_size  # taken first: what is written meanwhile is not damage
        for record in self.loader.Load():
            self.read_bytes += FRAME_BYTES + len(record)
            event = Event.FromString(record)
            self.begun = self.begun or event.wall_time
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    curve = self.curves.setdefault(value.tag, Curve([], [], []))
                    curve.steps.append(event.step)
                    curve.values.append(value.simple_value)
                    curve.times.append(event.wall_time)
        self.damage = self._damage(size - self.read_bytes)

    def _damage(self, rest: int) -> str | None:
        if rest <= 0:
            return None
        with open(self.path, "rb") as file:
            file.seek(self.read_bytes)
            header = file.read(HEADER.size)
        if len(header) == HEADER.size:
            length, checksum = HEADER.unpack(header)
            if masked_crc32c(header[:8]) != checksum or FRAME_BYTES + length <= rest:
                return f"{self.path}: damaged at byte {self.read_bytes}; the {rest} bytes from there on are not read"
        return f"{self.path}: its last {rest} bytes are part of a record: it was cut, or is being written"


class Log:
    """A log that may still grow: `curves` reads what is new.

    Each start writes a file. If one resumed from an earlier step than the previous start had reached, the values that
    the previous one logged from there on are dropped.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[Path, EventFile] = {}

    def curves(self) -> dict[str, Curve]:
        """Return all curves by name."""
        if not self.folder.is_dir():
            raise ConfigError(f"{self.folder}: is not there any more")
        for path in self.folder.glob(EVENT_FILES):
            self.files.setdefault(path, EventFile(path)).read()
        found: dict[str, dict[int, tuple[float, float]]] = {}
        for file in self.starts():
            if LOSS in file.curves:
                first = min(file.curves[LOSS].steps)
                found = {name: by_step if name.endswith(BY_SAMPLES) else
                         {step: value for step, value in by_step.items() if step < first}
                         for name, by_step in found.items()}
            for name, curve in file.curves.items():
                found.setdefault(name, {}).update(
                    (step, (value, time)) for step, value, time in zip(*curve, strict=True))
        return {name: Curve([*steps], *([by_step[step][i] for step in steps] for i in (0, 1)))
                for name, by_step in found.items() if (steps := sorted(by_step))}

    def starts(self) -> list[EventFile]:
        """Return the files that were read, in the order in which they were begun."""
        return sorted(self.files.values(), key=lambda file: (file.begun, file.path))

    def damages(self) -> list[str]:
        """Return a line for each file that was not read to its end."""
        return [file.damage for file in self.starts() if file.damage]


def read_log(run: RunFolder) -> Log:
    """Read the log of a run; raises ConfigError if it has no curves."""
    log = Log(run.log) if run.log else None
    if log and log.curves():
        return log
    damaged = f" ({'; '.join(log.damages())})" if log and log.damages() else ""
    raise ConfigError(f"{run.folder}: has no TensorBoard log with curves{damaged}; "
                      f"{run.missing_log or 'train with --tensorboard-dir'}")


def in_groups(names: Iterable[str], prefixes: Sequence[str]) -> list[str]:
    """Return the names that begin with one of `prefixes` and a slash, sorted by prefix and tick."""
    found = [name for name in names if name.partition("/")[0] in prefixes]
    return sorted(found, key=lambda name: (name.partition("/")[0], tick_of(name)))


def tick_of(name: str) -> int:
    """Return the number of the tick in a curve's name, 0 if there is none."""
    words = name.partition("/")[2].split()
    return int(words[1]) if len(words) > 1 and words[0] == "tick" and words[1].isdecimal() else 0
