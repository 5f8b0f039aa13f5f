"""Kill a rank at the worst moments of saves in the background, and look after every change whether a checkpoint stays.

From the first save on, some iteration must be whole whenever a file or a folder is about to be renamed or removed, and
the newest whole one never older than it was.
"""
from __future__ import annotations

import functools
import os
import signal
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

LOST = 17  # exit code where no whole checkpoint was left
TENSORS_SAVED = 5  # of a file, before a kill in it


def newest_whole(save: Path) -> int:
    """The newest iteration that could be gone on from; -1 without one."""
    from hrm_megatron.checkpoint.folders import complete_iterations
    from hrm_megatron.checkpoint.retention import is_whole

    return max((int(name.removeprefix("iter_")) for name in complete_iterations(save) if is_whole(save / name)),
               default=-1)


def watch(save: Path) -> None:
    """End this process where it is about to leave no whole checkpoint, or only an older one."""
    seen = [-1]

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        if event in ("os.remove", "os.rename", "os.rmdir") and str(arguments[0]).startswith(str(save)):
            newest = newest_whole(save)
            if newest < seen[0]:
                os.write(2, f"{event}: iteration {newest} is the newest whole one, it was {seen[0]}\n".encode())
                os._exit(LOST)
            seen[0] = newest
    sys.addaudithook(look)


def install(moment: str, iteration: int, save: Path, rank: int) -> None:
    """Kill where `moment` says, when `iteration` is saved; hrm_megatron.pretrain has been imported."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from hrm_megatron.checkpoint import retention
    from hrm_megatron.training import early_stopping, verification

    me, name = os.getpid(), f"iter_{iteration:07d}"

    def die(*_: object) -> NoReturn:
        os.kill(me, signal.SIGKILL)
        os._exit(1)

    def at(stock: Callable[..., Any], is_here: Callable[..., bool]) -> Callable[..., Any]:
        @functools.wraps(stock)  # its callers look at its parameters
        def run(*arguments: Any, **options: Any) -> Any:
            if is_here(*arguments):
                die()
            return stock(*arguments, **options)
        return run

    def remove_half(folder: Path) -> None:
        if (save / name).exists():
            next(folder.glob("*.distcp")).unlink()
            die()

    def of_this(*arguments: Any) -> bool:
        return (save / name).exists()
    written: list[int] = []

    def in_the_file(*_: Any) -> bool:
        written.append((save / name).exists())
        return sum(written) == TENSORS_SAVED
    watch(save)
    if moment == "in the background":  # by the process that saves, which dies with its rank
        if rank:
            filesystem_async._write_item = at(filesystem_async._write_item, in_the_file)
    elif moment == "before the manifest":  # behind all that Megatron does
        verification.write_manifest = at(verification.write_manifest, lambda folder, *_: folder.name == name)
    elif moment == "before the deletion":
        early_stopping.delete = at(early_stopping.delete, of_this)
    elif moment == "between renaming and deletion":
        retention.shutil = types.SimpleNamespace(rmtree=at(retention.shutil.rmtree, of_this))
    elif moment == "in the deletion":
        retention.shutil = types.SimpleNamespace(rmtree=remove_half)
    elif moment != "never":
        raise ValueError(moment)
