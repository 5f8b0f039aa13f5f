"""Folders that the `datasets` library saves to disk: which of their Arrow files hold the rows."""
from __future__ import annotations

import json
from pathlib import Path

from hrm_megatron.config import ConfigError

STATE_FILE = "state.json"
ITS_OWN_FILES = (STATE_FILE, "dataset_info.json", "dataset_dict.json")  # which hold no rows


def row_files(folder: Path) -> list[Path] | None:
    """List the files of a saved dataset in their order; None where a folder is none."""
    state = folder / STATE_FILE
    try:
        saved = json.loads(state.read_bytes())
        names = [entry["filename"] for entry in saved["_data_files"]]
        chosen = saved.get("_indices_data_files")
    except FileNotFoundError:
        return None
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
