"""Folders that the `datasets` library saves to disk or caches: which of their files hold the rows."""
from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from hrm_megatron.config import ConfigError

STATE_FILE = "state.json"
INFO_FILE, DICT_FILE = "dataset_info.json", "dataset_dict.json"
ITS_OWN_FILES = (STATE_FILE, INFO_FILE, DICT_FILE)  # metadata, without rows
COMPUTED = re.compile(r"cache-.*\.arrow")  # by map, filter, shuffle: copies of rows, or row indices
SPLIT = re.compile(r"(?:^|[-_.])(train|validation|valid|val|dev|test|eval)(?![a-z])", re.IGNORECASE)  # in a name


def splits_of(files: Sequence[Path]) -> dict[str, Path]:
    """Return the splits that files, or folders around them, are named after, and the first file of each."""
    around = len(Path(os.path.commonpath([file.absolute().parent for file in files])).parts) if files else 0
    found: dict[str, Path] = {}
    for file in files:
        if split := next(filter(None, map(SPLIT.search, file.absolute().parts[around:])), None):
            found.setdefault(split[1].lower(), file)
    return found


def row_files(folder: Path) -> list[Path] | None:
    """Return the files of a saved dataset in order, or those of a cached one; None if the folder is neither."""
    state = folder / STATE_FILE
    try:
        saved = json.loads(state.read_bytes())
        names = [entry["filename"] for entry in saved["_data_files"]]
        chosen = saved.get("_indices_data_files")
    except FileNotFoundError:
        cached = (folder / INFO_FILE).is_file()
        return [file for file in folder.iterdir() if not COMPUTED.fullmatch(file.name)] if cached else None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{state}: not that of a dataset saved to disk; rename it, or save the dataset again"
                          ) from error
    if chosen:
        raise ConfigError(f"{folder}: a dataset with a list of chosen rows beside them; save what "
                          "flatten_indices() of it returns")
    files = [folder / str(name) for name in names]
    if missing := [file for file in files if not file.is_file()]:
        raise ConfigError(f"{missing[0]}: missing from a dataset saved to disk; copy or save it again")
    return files
