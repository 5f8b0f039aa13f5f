"""`--ckpt-step N` of a run that saves where it loads: it goes back to an older iteration once, and nothing is lost.

What was saved behind that iteration is moved aside, and a record says so: later starts of the same command go on from
their newest iteration. Without the record, as behind a kill in between, a start begins at N and moves what is left.
"""
from __future__ import annotations

import argparse
import itertools
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path

from hrm_megatron.checkpoint.folders import complete_iterations
from hrm_megatron.checkpoint.manifest import ABANDONED, TRACKER_FILE
from hrm_megatron.checkpoint.retention import bytes_of
from hrm_megatron.checkpoint.verify import iteration_of
from hrm_megatron.config import ConfigError
from hrm_megatron.program import followed, write_aside
from hrm_megatron.training.early_stopping import RECORD_FILE as MEASURED_FILE
from hrm_megatron.training.early_stopping import Record as Measured
from hrm_megatron.training.run_files import unwritten, write_file
from hrm_megatron.training.summary import only_evaluates

log = logging.getLogger(__name__)

RECORD_FILE = "went_back.json"  # beside the checkpoints: which step the run went back to last, and when


def step_to_go_back_to(args: argparse.Namespace) -> int | None:
    """Return the iteration that a run goes back to within its own folder; None for one that moves nothing."""
    within = args.ckpt_step and args.load and args.load == args.save and not (args.finetune or args.skip_train)
    return args.ckpt_step if within else None


def went_back(args: argparse.Namespace) -> str | None:
    """Say in one line that the run has gone back as it is asked to, and goes on from its newest iteration; None where
    it has not."""
    step = step_to_go_back_to(args)
    if step is None or (record := _recorded(args.save)) is None or record[0] != step:
        return None
    return (f"checkpoint: --ckpt-step {step}: this run went back to it on {record[1]}, and goes on from its newest "
            f"iteration; remove {Path(args.save) / RECORD_FILE} to go back once more")


def way_back(args: argparse.Namespace, step: int) -> str:
    """Name the flag by which this run begins at iteration `step`, and what would keep it from that."""
    record = _recorded(args.save) if args.save and args.load == args.save and not args.skip_train else None
    made = record is not None and record[0] == step
    return f"--ckpt-step {step}" + (f" without {Path(args.save) / RECORD_FILE}" if made else "")


def _recorded(save: str) -> tuple[int, str] | None:
    """Read which step the run in `save` went back to last, and when."""
    place = Path(save) / RECORD_FILE
    try:
        found = json.loads(place.read_text(encoding="utf-8"))
        return int(found["step"]), str(found["time"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{place}: does not say which iteration the run went back to ({error}); remove it to go back "
                          "once more, or leave --ckpt-step out") from error


def describe_return(args: argparse.Namespace, step: int, moved: str = "would be moved") -> str:
    """Say in one line which iterations leave the folder when the run goes back to `step`."""
    later = _later(Path(args.save), step)
    if not later:
        return f"checkpoint: --ckpt-step {step}: no later iteration is in {args.save}"
    return f"checkpoint: --ckpt-step {step}: {_named(later)} {moved} to {Path(args.save) / ABANDONED}, and stays there"


def go_back(args: argparse.Namespace, step: int | None) -> None:
    """Move aside what the run saved behind `step`, if that is what it has loaded and trains from; on one rank.

    Raises ConfigError where the folder cannot be written.
    """
    if step is None or step != args.iteration or only_evaluates(args):
        return
    save = Path(args.save)
    aside, measured = save / ABANDONED, Measured.load(save / MEASURED_FILE)
    try:
        line = describe_return(args, step, "was moved")
        # First: until all is moved, a start without the flag is refused, which would take the newest that is left.
        write_file(args.save, TRACKER_FILE, str(step))
        for folder in _later(save, step):
            _move(folder, aside)
        if measured and measured != (kept := measured.until(step)):
            write_aside(_free(aside / MEASURED_FILE), (save / MEASURED_FILE).read_bytes())
            kept.write(args.save)
    except OSError as error:
        raise unwritten(args.save, f"what is behind iteration {step} into {aside}", error) from error
    write_file(args.save, RECORD_FILE, json.dumps({"step": step, "time": time.strftime("%Y-%m-%d %H:%M:%S")}) + "\n")
    log.info(line)


def _later(save: Path, step: int) -> list[Path]:
    return [save / name for name in complete_iterations(save) if iteration_of(name) > step]


def _named(folders: Sequence[Path]) -> str:
    names = folders[0].name if len(folders) == 1 else f"{folders[0].name} to {folders[-1].name}"
    return f"what was saved behind it ({names}: {len(folders)}, {bytes_of(folders) / 1e9:.3g} GB)"


def _move(folder: Path, aside: Path) -> None:
    """Move an iteration into `aside`, over nothing that is there; a link goes on to lead where it does."""
    aside.mkdir(exist_ok=True)
    place = _free(aside / folder.name)
    if folder.is_symlink():
        place.symlink_to(followed(folder))
        folder.unlink()
    else:
        folder.rename(place)


def _free(place: Path) -> Path:
    """Return the first of NAME, NAME.2, NAME.3, ... that is not there."""
    numbered = (place.with_name(f"{place.name}.{count}") for count in itertools.count(2))
    return next(one for one in itertools.chain([place], numbered) if not (one.exists() or one.is_symlink()))
