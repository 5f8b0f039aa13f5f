"""The state of a run, from the files in its folder only: arguments, saves, starts, steps that were rolled back.

It works whether the run is running, on this machine or another, or has ended.
"""
from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hrm_megatron.checkpoint.archive import DamagedError
from hrm_megatron.checkpoint.iterations import is_iteration, iteration_of
from hrm_megatron.checkpoint.manifest import (
    ABANDONED,
    ARGUMENTS_FILE,
    METADATA_FILE,
    STARTED_IN,
    TRACKER_FILE,
    read_manifest,
)
from hrm_megatron.cluster.attempts import ATTEMPTS_FILE, Attempt, History
from hrm_megatron.config import ConfigError

BAD_STEPS_FILE = "bad_steps.json"  # of training
NOT_GIVEN = "None"  # value of a flag that was not given
EVENT_FILES = "events.out.tfevents.*"
DEEPEST = 3  # levels of folders in which the log and the checkpoints are searched
WHOLE, NO_MANIFEST, PARTIAL = "complete", "complete, no manifest", "not complete"


@dataclass(frozen=True)
class Save:
    """An iteration in the folder of checkpoints. `state` is WHOLE if all files exist with the sizes in the manifest and
    the manifest matches its own digest; file contents are not read."""

    step: int
    folder: Path
    seconds: float  # since the epoch, of its last file
    size_bytes: int
    state: str


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run's parts; None for missing ones."""

    folder: Path
    log: Path | None
    checkpoints: Path | None
    arguments: Mapping[str, str]

    @classmethod
    def find(cls, folder: Path) -> RunFolder:
        """Find the log and the checkpoints in a folder, or where the arguments recorded there say."""
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no folder; give the one that --save or --tensorboard-dir named, or the one "
                              "around both")
        listed = next(iter(_below(folder, ARGUMENTS_FILE)), None)
        arguments = _arguments(listed) if listed else {}
        log = _only(folder, {path.parent for path in _below(folder, EVENT_FILES)}, "TensorBoard logs")
        saved = {path.parent for path in (*_below(folder, TRACKER_FILE), *_below(folder, "iter_*"))}
        checkpoints = _only(folder, {path for path in saved if path == folder or path.name.split(".")[0] != ABANDONED},
                            "folders of checkpoints")
        if listed and arguments.get("save", NOT_GIVEN) != NOT_GIVEN:  # else `listed` is in the log's folder
            log = log or _named_log(arguments, listed.parent)
            checkpoints = checkpoints or listed.parent
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
    def missing_log(self) -> str | None:
        """A line about the log that the arguments name but that is not found; None if it is found or they name none."""
        name = self.arguments.get("tensorboard_dir", NOT_GIVEN)
        if self.log or name == NOT_GIVEN:
            return None
        return (f"{ARGUMENTS_FILE} names --tensorboard-dir {name}, which is not found from here and for this run; give "
                "that folder, or the one around it and --save")

    @property
    def steps_between_lines(self) -> int:
        """Steps between log lines of a healthy run, from its intervals; 1 if unknown."""
        values = [self.arguments.get(name, "") for name in ("log_interval", "tensorboard_log_interval")]
        return max((int(value) for value in values if value.isdecimal()), default=1)

    def saves(self) -> list[Save]:
        """Return the iterations sorted by step."""
        folders = self.checkpoints.iterdir() if self.checkpoints else ()
        found = [_save(path) for path in folders if is_iteration(path.name) and path.is_dir()]
        return sorted((save for save in found if save), key=lambda save: save.step)

    def starts(self) -> int:
        """Return the number of starts that logged anything: each has its own event file."""
        return len([*self.log.glob(EVENT_FILES)]) if self.log else 0

    def attempts(self) -> list[Attempt]:
        """Return the starts that the Slurm script recorded."""
        place = next(iter(_below(self.folder, ATTEMPTS_FILE)), None)
        return History(place.parent).attempts if place else []

    def bad_steps(self) -> list[int]:
        """Return the steps whose rows are skipped because the run rolled back from them."""
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


def _named_log(arguments: Mapping[str, str], home: Path) -> Path | None:
    """Return the log named by the arguments in `home`, the folder of --save, or None.

    A relative name is relative to where the run was started; from elsewhere it may lead to another run's log. The
    arguments record the starting folder. If --save is in it, the starting folder is one from which --save leads to
    `home`, even if all was moved.
    """
    name, save = Path(arguments.get("tensorboard_dir", NOT_GIVEN)), Path(os.path.normpath(arguments["save"]))
    if name.is_absolute():
        return name if name.is_dir() else None
    recorded = [Path(arguments[STARTED_IN])] if STARTED_IN in arguments else []  # not by older runs
    save = next((save.relative_to(start) for start in recorded if save.is_relative_to(start)), save)
    if save.is_absolute() or os.pardir in save.parts:
        starts = recorded or [Path.cwd()]
    else:
        starts = [*recorded, home, *home.absolute().parents, *home.resolve().parents, Path.cwd()]
    return next((start / name for start in starts if (start / name).is_dir() and (start / save).is_dir()
                 and (start / save).samefile(home)), None)


def _arguments(listed: Path) -> dict[str, str]:
    """Read the arguments that a run writes to --save or, without it, to --tensorboard-dir."""
    lines = listed.read_text(encoding="utf-8", errors="replace").splitlines()
    return {found[1]: found[2] for line in lines if (found := re.fullmatch(r"(\w+) \.* (.*)", line))}


def _save(folder: Path) -> Save | None:
    """Return an iteration as a Save; None if it was deleted meanwhile."""
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
