"""The folder that `--save` names: its iterations, which of them are complete, and the run that saved one."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron.core.safe_globals import SAFE_GLOBALS

from hrm_megatron.checkpoint.archive import WAY_OUT, DamagedError
from hrm_megatron.checkpoint.dcp import DCPFolder
from hrm_megatron.checkpoint.fsdp_folder import COMMON, is_megatron_fsdp
from hrm_megatron.checkpoint.iterations import RELEASE, folder_name, is_iteration, iteration_of
from hrm_megatron.checkpoint.manifest import MANIFEST_FILE, METADATA_FILE, TRACKER_FILE, read_manifest
from hrm_megatron.config import Architecture, ConfigError
from hrm_megatron.program import followed
from hrm_megatron.transformer_config import architecture_of

DCP_CONFIG_FILE = "metadata.json"
COMPLETE_FILES = (MANIFEST_FILE, DCP_CONFIG_FILE, METADATA_FILE)  # written last, the manifest after all others


def is_complete(folder: Path) -> bool:
    """Return whether the save of this iteration has finished; a file that is missing nevertheless is damage."""
    if (folder / MANIFEST_FILE).exists():
        return True
    try:
        if not (folder / DCP_CONFIG_FILE).exists():  # Megatron-FSDP writes none
            return (folder / METADATA_FILE).is_file() and is_megatron_fsdp(DCPFolder(folder))
        json.loads((folder / DCP_CONFIG_FILE).read_text())
    except (OSError, ValueError):  # ConfigError is a ValueError
        return False
    return (folder / METADATA_FILE).is_file()


def complete_iterations(load: Path) -> list[str]:
    """Return the names of the complete iterations under `load`, ascending."""
    folders = load.iterdir() if load.is_dir() else ()
    return sorted((path.name for path in folders if is_iteration(path.name) and is_complete(path)), key=iteration_of)


def last_saved_first(load: Path) -> list[str]:
    """Return the names of the complete iterations, the last saved first.

    An iteration without a manifest counts as saved after all lower ones: its run was killed before it wrote the
    manifest.
    """
    found, latest = [], 0
    for name in complete_iterations(load):
        save = _save(load / name)
        latest = max(latest, save)
        found.append((save or latest, iteration_of(name)))
    return [folder_name(iteration) for *_, iteration in sorted(found, reverse=True)]


def _save(folder: Path) -> int:
    """Return the save count of an iteration, 0 if it has no manifest."""
    manifest = read_manifest(folder, or_none=True)
    return manifest.save if manifest else 0


def find_iteration(load: str | Path, step: int | None = None) -> Path:
    """Return an iteration's folder: `load` itself if it is one, else that of `step`, else the tracked one."""
    load = Path(load)
    named = next((path for path in (load, followed(load)) if path.name == RELEASE or is_iteration(path.name)), None)
    if named and step is None and not (load / TRACKER_FILE).exists():
        folder, load = named, named.parent
    elif step is not None:
        folder = load / folder_name(step)
    else:
        folder = load / _tracked(load)
        _check_tracked(load, folder)
    if not is_complete(folder):
        state = "half-written" if folder.is_dir() else "not there"
        raise ConfigError(f"{folder}: {state}; choose another with --ckpt-step{listed(load)}")
    return folder


def _tracked(load: Path) -> str:
    place = load / TRACKER_FILE
    try:
        text = place.read_text().strip()
        return text if text == RELEASE else folder_name(int(text))
    except OSError as error:
        raise ConfigError(f"{place}: cannot read ({error.strerror}); give the folder that --save named, or one of its "
                          f"iterations{listed(load)}") from error
    except ValueError as error:
        raise ConfigError(f"{place}: holds no iteration; choose one with --ckpt-step{listed(load)}") from error


def _check_tracked(load: Path, folder: Path) -> None:
    """Refuse a tracker file that names another iteration than the last one saved, by the manifests alone."""
    saves = {name: _save(load / name) for name in complete_iterations(load)}
    last = max(saves, key=saves.__getitem__, default="")
    if 0 < _save(folder) < saves.get(last, 0):
        raise DamagedError(f"{load / TRACKER_FILE}: names {folder.name}, but {last} was saved after it; say which one "
                           "with --ckpt-step")


def listed(load: Path) -> str:
    complete = complete_iterations(load)
    return f" (complete: {', '.join(complete)})" if complete else " (none is complete there)"


def read_run(stored: DCPFolder) -> tuple[dict[str, Any], Architecture]:
    """Return what a Megatron checkpoint holds beside tensors, and the architecture of its model."""
    try:
        common: dict[str, Any] = stored.object(COMMON, SAFE_GLOBALS)[0]
        args = common["args"]
        architecture = architecture_of(args, args.vocab_size)
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise not_of_an_hrm(stored.path, error) from error
    for name, value in (stored.manifest.settings if stored.manifest else {}).items():
        if getattr(architecture, name, value) != value:
            raise DamagedError(f"{stored.path / MANIFEST_FILE}: says {name}={value}, the checkpoint itself "
                               f"{getattr(architecture, name)}; {WAY_OUT}")
    return common, architecture


def not_of_an_hrm(path: Path, error: Exception) -> ConfigError:
    return ConfigError(f"{path}: a Megatron checkpoint, but not of an HRM ({error}); give one that "
                       "hrm_megatron.pretrain saved")
