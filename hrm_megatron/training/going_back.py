"""`--ckpt-step N` of a run that saves where it loads: roll back to an older iteration once, without deleting anything.

Later iterations are moved aside and the rollback is recorded, so that later starts of the same command resume from the
newest iteration. After a kill during the move, the next start with the flag loads N and moves what is left; a start
without the flag is refused.
"""
from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from hrm_megatron.checkpoint.folders import complete_iterations, find_iteration
from hrm_megatron.checkpoint.iterations import iteration_of
from hrm_megatron.checkpoint.manifest import ABANDONED, TRACKER_FILE
from hrm_megatron.checkpoint.retention import bytes_of
from hrm_megatron.config import ConfigError
from hrm_megatron.program import followed, write_aside
from hrm_megatron.training.early_stopping import RECORD_FILE as MEASURED_FILE
from hrm_megatron.training.early_stopping import Record as Measured
from hrm_megatron.training.run_files import read_record, unwritten, write_file
from hrm_megatron.training.summary import only_evaluates

log = logging.getLogger(__name__)

RECORD_FILE = "went_back.json"  # beside the checkpoints: the last rollback of the run


def _asked(args: argparse.Namespace) -> int | None:
    """Return the iteration that a run is asked to roll back to within its own folder, or None if nothing is moved."""
    return args.ckpt_step if args.ckpt_step and _trains_on(args) else None


def _trains_on(args: argparse.Namespace) -> bool:
    return bool(args.load and args.load == args.save and not (args.finetune or args.skip_train))


def step_to_go_back_to(args: argparse.Namespace) -> int | None:
    """Return the iteration that this start rolls back to, or None if nothing is moved or the rollback is done."""
    step = _asked(args)
    return None if step is None or went_back(args) else step


def went_back(args: argparse.Namespace) -> str | None:
    """Return one line that says that the requested rollback is done and the run resumes from its newest iteration, or
    None if it is not done."""
    step = _asked(args)
    if step is None or (made := _recorded(args.save)) is None or not made.finished or made.step != step:
        return None
    return (f"checkpoint: --ckpt-step {step}: this run went back to it on {made.time}, and goes on from its newest "
            f"iteration; remove {Path(args.save) / RECORD_FILE} to go back once more")


def refuse_half_a_return(args: argparse.Namespace) -> None:
    """Raise ConfigError for a start without --ckpt-step in a folder whose last rollback was interrupted."""
    if args.ckpt_step or not _trains_on(args):
        return
    made = _recorded(args.save)
    if made and not made.finished:
        raise ConfigError(f"--save {args.save}: a start that went back to iteration {made.step} was interrupted; give "
                          f"--ckpt-step {made.step} to end that, or remove {Path(args.save) / RECORD_FILE}")


def way_back(args: argparse.Namespace, step: int) -> str:
    """Return the flag that makes this run load iteration `step`, and the record to remove first, if any."""
    made = _recorded(args.save) if _trains_on(args) else None
    blocked = made is not None and made.finished and made.step == step
    return f"--ckpt-step {step}" + (f" without {Path(args.save) / RECORD_FILE}" if blocked else "")


def correct_tracker(args: argparse.Namespace, folder: Path) -> None:
    """Let the tracker file of a run that saves where it loads name `folder`, the iteration that it resumes from; other
    tools read it before the next save. A rollback writes it later. Call it under the lock of --save.

    Raises ConfigError if the file cannot be written.
    """
    own = args.save and args.load == args.save and folder.parent == Path(args.save)
    if not own or args.rank or args.skip_train or (args.ckpt_step and not went_back(args)):
        return
    with contextlib.suppress(ConfigError):
        if find_iteration(args.load) == folder:
            return
    write_file(args.save, TRACKER_FILE, str(iteration_of(folder.name)))


@dataclass(frozen=True)
class _Return:
    """The last rollback of a run: its target step, its time, and whether the move is finished."""

    step: int
    time: str
    finished: bool

    def write(self, save: str) -> None:
        write_file(save, RECORD_FILE, json.dumps(asdict(self)) + "\n")


def _recorded(save: str) -> _Return | None:
    """Return the last rollback recorded in `save`, or None."""
    return read_record(
        Path(save) / RECORD_FILE,
        lambda found: _Return(int(found["step"]), str(found["time"]), bool(found["finished"])),
        "does not say which iteration the run went back to", "remove it to go back once more, or to go on")


def describe_return(args: argparse.Namespace, step: int, moved: str = "would be moved") -> str:
    """Return one line that names the iterations moved aside by a rollback to `step`."""
    later = _later(Path(args.save), step)
    if not later:
        return f"checkpoint: --ckpt-step {step}: no later iteration is in {args.save}"
    return f"checkpoint: --ckpt-step {step}: {_named(later)} {moved} to {Path(args.save) / ABANDONED}, and stays there"


def go_back(args: argparse.Namespace, step: int | None) -> None:
    """Move aside what the run saved after `step`, if the run has loaded `step` and trains from it; call it on one rank.

    Raises ConfigError if the folder cannot be written.
    """
    if step is None or step != args.iteration or only_evaluates(args):
        return
    save = Path(args.save)
    measured = Measured.load(save / MEASURED_FILE)
    made = _Return(step, time.strftime("%Y-%m-%d %H:%M:%S"), finished=False)
    try:
        line = describe_return(args, step, "was moved")
        made.write(args.save)  # first, so that a start without the flag is refused until all is moved
        write_file(args.save, TRACKER_FILE, str(step))
        for folder in _later(save, step):
            _move(folder, save)
        if measured and measured != (kept := measured.until(step)):
            write_aside(_free(save, MEASURED_FILE), (save / MEASURED_FILE).read_bytes())
            kept.write(args.save)
    except OSError as error:
        raise unwritten(args.save, f"what is behind iteration {step} into {save / ABANDONED}", error) from error
    replace(made, finished=True).write(args.save)
    log.info(line)


def _later(save: Path, step: int) -> list[Path]:
    return [save / name for name in complete_iterations(save) if iteration_of(name) > step]


def _named(folders: Sequence[Path]) -> str:
    names = folders[0].name if len(folders) == 1 else f"{folders[0].name} to {folders[-1].name}"
    return f"what was saved behind it ({names}: {len(folders)}, {bytes_of(folders) / 1e9:.3g} GB)"


def _move(folder: Path, save: Path) -> None:
    """Move an iteration aside without overwriting anything; a symlink keeps its target."""
    place = _free(save, folder.name)
    place.parent.mkdir(exist_ok=True)
    if folder.is_symlink():
        place.symlink_to(followed(folder))
        folder.unlink()
    else:
        folder.rename(place)


def _free(save: Path, name: str) -> Path:
    """Return the path of `name` in the first of abandoned, abandoned.2, abandoned.3, ... in which it is free."""
    asides = (save / f"{ABANDONED}.{count}" for count in itertools.count(2))
    places = (aside / name for aside in itertools.chain([save / ABANDONED], asides))
    return next(place for place in places if not (place.exists() or place.is_symlink()))
