"""Which iterations of a run are deleted, once a newer one is whole and its manifest says so."""
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
    """Tell whether the manifest of an iteration is there, and all files that it lists are as long as it says."""
    manifest = read_manifest(folder, or_none=True)
    try:
        if manifest:
            manifest.check_sizes()
    except DamagedError:
        return False
    return manifest is not None


def expendable(save: Path, latest: int, keep: int, interval: int | None, protected: Collection[int]) -> list[int]:
    """Return the iterations before `latest` that may go: all but the last `keep`, multiples of `interval`, and those
    that are protected.

    Only whole iterations count as kept, and only they go: what is damaged is no copy of anything, and whoever looks for
    the reason wants it. Nothing goes unless `latest` is whole. Iteration 0 is what a run began with, not its own.
    """
    numbers = [iteration_of(name) for name in complete_iterations(save)]
    whole = [number for number in numbers if number <= latest and is_whole(save / folder_name(number))]
    if latest not in whole:
        return []
    stays = {0, *whole[-keep:], *protected}
    return [number for number in whole if number not in stays and not (interval and number % interval == 0)
            and not (save / folder_name(number)).is_symlink()]


def delete(save: Path, iterations: Collection[int]) -> None:
    """Delete iterations so that a kill leaves none that looks whole and is not.

    They are renamed now. Their files, one or more of each rank, go in a thread beside the training, for which all ranks
    would wait; `finish_deletion` waits for that.
    """
    finish_deletion(save)
    for number in iterations:
        folder = save / folder_name(number)
        folder.rename(save / f".{folder.name}{ASIDE}")
    thread = threading.Thread(target=_remove_files, args=(save,))
    thread.start()
    _threads.append(thread)


def finish_deletion(save: Path) -> None:
    """Have the space of all iterations that were deleted, also of those that a kill has left in part."""
    while _threads:
        _threads.pop().join()
    _remove_files(save)


def bytes_of_deleted(save: Path) -> int:
    """Bytes of iterations that were deleted, but for their files: the next save has them."""
    return bytes_of(_deleted(save))


def bytes_of(folders: Iterable[Path]) -> int:
    """Bytes of the files in these folders of iterations."""
    return sum(size_of(path) or 0 for folder in folders for path in folder.iterdir())


def _deleted(save: Path) -> list[Path]:
    return [*save.glob(f".iter_*{ASIDE}")]


def _remove_files(save: Path) -> None:
    for folder in _deleted(save):
        try:
            shutil.rmtree(folder)
        except OSError as error:
            log.warning(f"checkpoint: cannot delete {folder} ({error}); the next save tries again")
