"""Decide which iterations of a run to delete once a newer one is whole, as its manifest proves, and delete them."""
from __future__ import annotations

import logging
import shutil
import threading
from collections.abc import Collection, Iterable
from pathlib import Path

from hrm_megatron.checkpoint.archive import DamagedError
from hrm_megatron.checkpoint.folders import complete_iterations
from hrm_megatron.checkpoint.iterations import folder_name, iteration_of
from hrm_megatron.checkpoint.manifest import read_manifest, size_of

ASIDE = ".deleted"

log = logging.getLogger(__name__)
_threads: list[threading.Thread] = []


def is_whole(folder: Path) -> bool:
    """Return whether an iteration has a manifest, and all files that it lists have the recorded sizes."""
    manifest = read_manifest(folder, or_none=True)
    try:
        if manifest:
            manifest.check_sizes()
    except DamagedError:
        return False
    return manifest is not None


def expendable(save: Path, latest: int, keep: int, interval: int | None, protected: Collection[int]) -> list[int]:
    """Return the iterations before `latest` that may be deleted: all but the last `keep`, multiples of `interval`, and
    `protected` ones.

    Only whole iterations count as kept, and only they are deleted: a damaged one is no valid copy, and it is evidence
    of what went wrong. Nothing is deleted unless `latest` is whole. Iteration 0 is what the run started from, not its
    own save.
    """
    numbers = [iteration_of(name) for name in complete_iterations(save)]
    whole = [number for number in numbers if number <= latest and is_whole(save / folder_name(number))]
    if latest not in whole:
        return []
    stays = {0, *whole[-keep:], *protected}
    return [number for number in whole if number not in stays and not (interval and number % interval == 0)
            and not (save / folder_name(number)).is_symlink()]


def delete(save: Path, iterations: Collection[int]) -> None:
    """Delete iterations such that a kill leaves none that looks whole but is not.

    Each is renamed at once. The files, one or more per rank, are removed in a thread, since all ranks would otherwise
    wait for it; `finish_deletion` joins it.
    """
    finish_deletion(save)
    for number in iterations:
        folder = save / folder_name(number)
        folder.rename(save / f".{folder.name}{ASIDE}")
    thread = threading.Thread(target=_remove_files, args=(save,))
    thread.start()
    _threads.append(thread)


def finish_deletion(save: Path) -> None:
    """Remove all files of deleted iterations, including those that a killed process left, and wait for it."""
    while _threads:
        _threads.pop().join()
    _remove_files(save)


def bytes_of_deleted(save: Path) -> int:
    """Return the bytes of deleted iterations whose files still exist: the next save can count on them."""
    return bytes_of(_deleted(save))


def bytes_of(folders: Iterable[Path]) -> int:
    """Return the bytes of the files in these iteration folders."""
    return sum(size_of(path) or 0 for folder in folders for path in folder.iterdir())


def _deleted(save: Path) -> list[Path]:
    return [*save.glob(f".iter_*{ASIDE}")]


def _remove_files(save: Path) -> None:
    for folder in _deleted(save):
        try:
            shutil.rmtree(folder)
        except OSError as error:
            log.warning(f"checkpoint: cannot delete {folder} ({error}); the next save tries again")
