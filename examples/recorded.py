"""Runs of a study in a file, one row each; the study resumes with the run that was interrupted."""
from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hrm_megatron.config import ConfigError
from hrm_megatron.data.text_files import read_lines
from hrm_megatron.generate.answer_file import AnswerFile, check_settings, write_settings
from hrm_megatron.program import Stopped

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Row = dict[str, Any]


def recorded[Run: DataclassInstance](path: Path, settings: Mapping[str, Any], runs: Sequence[Run],
                                     train: Callable[[Run], Row], describe: Callable[[Row], str]) -> list[Row]:
    """Return a row for each run, training those that are not in the file yet; a row contains its run's fields.

    Raises ConfigError for a file with other settings, and for a damaged one.
    """
    note, settings = path.with_name(f"{path.stem}.settings.json"), json.loads(json.dumps(settings))
    path.parent.mkdir(parents=True, exist_ok=True)
    if note.exists():
        check_settings(note, settings, f"{path.name}*", path, ", or choose another --output")
    elif path.exists():
        raise ConfigError(f"{path}: is not of this example, which keeps {note.name} beside it; choose another --output")
    else:
        write_settings(note, settings)
    if not path.exists():
        with AnswerFile(path, settings) as file:
            for number, one in enumerate(runs[file.done:], file.done + 1):
                began = time.monotonic()
                try:
                    row = train(one)
                except Stopped:
                    print(f"{path.stem} {number}/{len(runs)}: stopped; the same command goes on with this run",
                          file=sys.stderr)
                    raise
                file.write(row)
                print(f"{path.stem} {number}/{len(runs)}: {describe(row)} in {time.monotonic() - began:.0f} s",
                      flush=True)
            file.finish()
    return _read(path, runs, describe, f"; remove it and {note.name} to begin again")


def _read[Run: DataclassInstance](path: Path, runs: Sequence[Run], describe: Callable[[Row], str],
                                  way_out: str) -> list[Row]:
    rows, lines = [], read_lines(path)
    for number, (line, run) in enumerate(zip(lines, runs, strict=False), 1):
        try:
            row = json.loads(line)
            describe(row)
            if differing := [name for name, value in asdict(run).items() if row.get(name) != value]:
                raise ValueError(f"its {differing[0]} is {row.get(differing[0])!r}")
        except (ValueError, TypeError, LookupError) as error:
            raise ConfigError(f"{path}:{number}: is no row of {run} ({error}){way_out}") from error
        rows.append(row)
    if len(lines) != len(runs):
        raise ConfigError(f"{path}: has {len(lines)} rows, and the plan has {len(runs)} runs{way_out}")
    return rows
