"""What the folder of a run says of it, from files alone: arguments, saves, starts, steps that were gone back from.

The run itself is never asked: it may be running, on another machine, or over.
"""
from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hrm_megatron.checkpoint.archive import DamagedError
from hrm_megatron.checkpoint.iterations import is_iteration, iteration_of
from hrm_megatron.checkpoint.manifest import ABANDONED, METADATA_FILE, TRACKER_FILE, read_manifest
from hrm_megatron.cluster.attempts import ATTEMPTS_FILE, Attempt, History
from hrm_megatron.config import ConfigError

ARGUMENTS_FILE, BAD_STEPS_FILE = "arguments.txt", "bad_steps.json"  # training/console.py, training/bad_steps.py
SLURM_FOLDER = "slurm"  # launch_scripts/train_slurm.sh
EVENT_FILES = "events.out.tfevents.*"
DEEPEST = 3  # folders below the run's own in which its log and its checkpoints are looked for
WHOLE, NO_MANIFEST, PARTIAL = "complete", "complete, no manifest", "not complete"


@dataclass(frozen=True)
class Save:
    """An iteration in the folder of checkpoints. `state`: WHOLE if all files are there, as long as the manifest says,
    and the manifest has its own digest; contents are read by nobody here."""

    step: int
    folder: Path
    seconds: float  # since the epoch, of its last file
    size_bytes: int
    state: str


@dataclass(frozen=True)
class RunFolder:
    """Where the parts of a run are; None for what is not there."""

    folder: Path
    log: Path | None
    checkpoints: Path | None
    arguments: Mapping[str, str]

    @classmethod
    def find(cls, folder: Path) -> RunFolder:
        """Look for the log and the checkpoints in a folder, or where the arguments that are kept there say."""
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no folder; give the one that --save or --tensorboard-dir named, or the one "
                              "around both")
        arguments = _arguments(folder)
        log = _only(folder, {path.parent for path in _below(folder, EVENT_FILES)}, "TensorBoard logs")
        saved = {path.parent for path in (*_below(folder, TRACKER_FILE), *_below(folder, "iter_*"))}
        checkpoints = _only(folder, {path for path in saved if path == folder or path.name.split(".")[0] != ABANDONED},
                            "folders of checkpoints")
        log = log or _named(arguments, "tensorboard_dir")
        checkpoints = checkpoints or _named(arguments, "save")
        if not (log or checkpoints or arguments):
            raise ConfigError(f"{folder}: neither a TensorBoard log nor checkpoints are there; give the folder that "
                              "--save or --tensorboard-dir named, or the one around both")
        return cls(folder, log, checkpoints, arguments)

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def train_iters(self) -> int | None:
        value = self.arguments.get("train_iters", "")
        return int(value) if value.isdecimal() else None

    @property
    def steps_between_lines(self) -> int:
        """Steps after which a healthy run has written to its log: those of its intervals, 1 where nobody knows."""
        values = [self.arguments.get(name, "") for name in ("log_interval", "tensorboard_log_interval")]
        return max((int(value) for value in values if value.isdecimal()), default=1)

    def saves(self) -> list[Save]:
        """List the iterations by step."""
        folders = self.checkpoints.iterdir() if self.checkpoints else ()
        found = [_save(path) for path in folders if is_iteration(path.name) and path.is_dir()]
        return sorted((save for save in found if save), key=lambda save: save.step)

    def starts(self) -> int:
        """Count the starts that came as far as their first curve: each has a file of events of its own."""
        return len([*self.log.glob(EVENT_FILES)]) if self.log else 0

    def attempts(self) -> list[Attempt]:
        """List the starts that Slurm's script wrote down."""
        place = next(iter(_below(self.folder, ATTEMPTS_FILE)), None)
        return History(place.parent).attempts if place else []

    def bad_steps(self) -> list[int]:
        """List the steps whose rows are left out because the run went back from them."""
        place = self.checkpoints / BAD_STEPS_FILE if self.checkpoints else None
        if place is None or not place.exists():
            return []
        try:
            return [int(step) for step in json.loads(place.read_text(encoding="utf-8"))["steps"]]
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError(f"{place}: is no record of bad steps ({error})") from error


def _below(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for depth in range(DEEPEST) for path in folder.glob("*/" * depth + pattern))


def _only(folder: Path, found: set[Path], what: str) -> Path | None:
    if len(found) > 1:
        raise ConfigError(f"{folder}: several {what} are in it: {', '.join(map(str, sorted(found)))}; give one run's "
                          "folder")
    return next(iter(found), None)


def _named(arguments: Mapping[str, str], name: str) -> Path | None:
    place = Path(arguments.get(name, ""))
    return place if arguments.get(name) and place.is_dir() else None


def _arguments(folder: Path) -> dict[str, str]:
    """Read the list of arguments that a run leaves in --save or, without it, in --tensorboard-dir."""
    place = next(iter(_below(folder, ARGUMENTS_FILE)), None)
    lines = place.read_text(encoding="utf-8", errors="replace").splitlines() if place else ()
    return {found[1]: found[2] for line in lines if (found := re.fullmatch(r"(\w+) \.* (.*)", line))}


def _save(folder: Path) -> Save | None:
    """Describe an iteration; None if it was deleted meanwhile."""
    try:
        files = [path.stat() for path in folder.iterdir() if path.is_file()]
        state = _state(folder)
    except FileNotFoundError:
        return None
    return Save(iteration_of(folder.name), folder, max((file.st_mtime for file in files), default=0.0),
                sum(file.st_size for file in files), state)


def _state(folder: Path) -> str:
    try:
        manifest = read_manifest(folder)
        if manifest is None:
            return NO_MANIFEST if (folder / METADATA_FILE).is_file() else PARTIAL
        manifest.check_sizes()
    except DamagedError as error:
        return f"damaged: {error}"
    return WHOLE
