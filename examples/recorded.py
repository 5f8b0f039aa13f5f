"""Runs of a study in a file, one row each: a start goes on with the run in which the one before was interrupted."""
from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hrm_megatron.config import ConfigError
from hrm_megatron.data.text_files import read_lines
from hrm_megatron.generate.answer_file import AnswerFile, check_settings, write_settings
from hrm_megatron.program import Stopped

Row = dict[str, Any]


def recorded[Run](path: Path, settings: Mapping[str, Any], runs: Sequence[Run], train: Callable[[Run], Row],
                  describe: Callable[[Row], str]) -> list[Row]:
    """Return a row for each run, training those that the file does not have yet; one of other settings is refused."""
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
    return [json.loads(line) for line in read_lines(path)]
