"""How a program of ours ends: a refusal or a signal is one line and an exit status, and leaves nothing half-written."""
from __future__ import annotations

import atexit
import contextlib
import glob
import io
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO

from hrm_megatron.config import ConfigError

log = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# What CUDA says where it has no memory for a context, and cuBLAS for its workspace.
CUDA_IS_FULL = re.compile("CUDA error: (out of memory|CUBLAS_STATUS_ALLOC_FAILED)")

_held_blocks = 0
_waiting: int | None = None  # the signal that came in a held block


class Stopped(SystemExit):
    """A signal asks the program to end, with status 128 + its number. `except Exception` lets it pass."""


def listen() -> None:
    """Make SIGINT, SIGTERM and SIGHUP raise `Stopped` from here on, and end the program with one line about it.

    Call it before the imports that take seconds. A signal that the caller ignores (nohup, a background job) stays
    ignored. Standard streams that the caller closed are then /dev/null.
    """
    _open_closed_streams()
    for number in STOP_SIGNALS:
        if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: set by something else than Python
            signal.signal(number, _on_signal)


def _open_closed_streams() -> None:
    """Keep the numbers of closed streams from the next files to be opened, which would get what is said to them."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)  # the lowest that is free
            os.set_inheritable(descriptor, True)
            mode = "w" if number else "r"
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))  # noqa: SIM115  # it stays


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """`listen` for the length of a block that writes files, in a program that leaves signals to others."""
    if threading.current_thread() is not threading.main_thread():  # handlers are the main thread's
        yield
        return
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    listen()
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


def one_line(work: Callable[[], object], refusals: tuple[type[Exception], ...] = ()) -> int:
    """Do `work` and return the exit status of the program: bad input is one line on stderr and status 1.

    `refusals` are more kinds of errors whose message is for the user. So is a full GPU.
    """
    expected: tuple[type[Exception], ...] = (ConfigError, OSError, *refusals)
    if isinstance(sys.stdout, io.TextIOWrapper):  # it spells out what the terminal has no characters for
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        work()
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as error:  # the work is done, and its outputs are there
            raise OSError(error.errno, error.strerror, "standard output") from error
    except BrokenPipeError:  # `head` and the like have read enough
        _give_up_output()
        return 128 + signal.SIGPIPE
    except expected as error:
        return _refused(str(error))
    except RuntimeError as error:
        line = str(error).partition("\n")[0]
        # By its name, as most of our programs import no torch; outside of torch's allocator it is any RuntimeError.
        if type(error).__name__ != "OutOfMemoryError" and not CUDA_IS_FULL.search(line):
            raise
        return _refused(f"GPU memory is full ({line}); free it, or hide the GPU: CUDA_VISIBLE_DEVICES=")
    return 0


def _refused(line: str) -> int:
    print(f"error: {line}", file=sys.stderr)
    _give_up_output()
    return 1


def _give_up_output() -> None:
    """Drop what stdout does not take: Python would flush, and fail, once more at the end, in lines and a status of its
    own."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Let signals wait for the end of the block, which renames or removes files and must not stop half-way."""
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return
    global _held_blocks, _waiting
    _held_blocks += 1
    try:
        yield
    finally:
        _held_blocks -= 1
        if not _held_blocks and _waiting is not None:
            number, _waiting = _waiting, None
            _on_signal(number, None)


def check_outputs(outputs: Mapping[str, Path | None], suffixes: tuple[str, ...] = (),
                  inputs: Mapping[str, Path | None] | None = None) -> None:
    """Refuse, by their flags, files that could not be written in the end, or are read; call it before the work.

    Their names end as `suffixes` say, or as the flag says.
    """
    given = {flag: path for flag, path in outputs.items() if path is not None}
    for number, (flag, path) in enumerate(given.items()):
        wanted = suffixes or ((".png",) if flag == "--png" else ())
        if wanted and path.suffix not in wanted:
            raise ConfigError(f"{flag} {path}: the name of this file must end with {' or '.join(wanted)}")
        if path.is_dir():
            raise ConfigError(f"{flag} {path}: is a folder; name a file in it")
        _check_around(flag, path)
        for other in [*given][:number]:
            if followed(given[other]) == followed(path):
                raise ConfigError(f"{flag} {path}: is what {other} names too; give another file")
        for other, read in (inputs or {}).items():
            if read is not None and path.exists() and read.exists() and path.samefile(read):
                raise ConfigError(f"{flag} {path}: is what {other} reads, and would be lost; give another file")


def check_folder(flag: str, folder: Path, inputs: Mapping[str, Path | None] | None = None) -> None:
    """Refuse, by its flag, a folder that no other could replace in the end, or that holds what is read; call it before
    the work."""
    place = followed(folder)
    if os.path.ismount(place):
        raise ConfigError(f"{flag} {folder}: is a mount point, which no folder replaces; name a folder in it")
    if Path.cwd().is_relative_to(place):
        raise ConfigError(f"{flag} {folder}: is the current folder, or around it, and another would take its place; "
                          "name a folder in it, or start elsewhere")
    _check_around(flag, folder)
    for other, read in (inputs or {}).items():
        if read is not None and followed(read).is_relative_to(place):
            raise ConfigError(f"{flag} {folder}: holds what {other} reads ({read}), which would be lost; choose a "
                              "folder apart")


def _check_around(flag: str, path: Path) -> None:
    around = nearest(followed(path).parent)
    if not (around.is_dir() and os.access(around, os.W_OK | os.X_OK)):
        raise ConfigError(f"{flag} {path}: nothing can be written in {around}; choose another place")


def nearest(path: Path) -> Path:
    """The first that is there of an absolute path and the folders around it."""
    return next(place for place in (path, *path.parents) if place.exists())


def followed(path: Path) -> Path:
    """The place that a path leads to; of `Path.resolve`, which is the same, loops of links are a RuntimeError."""
    return Path(os.path.realpath(path))


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a name beside `path`; the file that the block writes there replaces `path` if the block ends well.

    Whatever ends the program or the machine, `path` is there whole or as it was before. The folder around it is made;
    the mode is that of the file that is replaced, else what the umask says. Of a link it is what that leads to.
    """
    place = followed(path)
    partial = place.with_name(f".{place.stem}.partial-{uuid.uuid4().hex}{path.suffix}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            _bring_to_disk(partial)  # a name may reach the disk before what it names
            if place.exists():
                shutil.copymode(place, partial)
            partial.replace(place)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        if error.filename not in (None, str(partial)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # the partial one is not the user's concern


def _bring_to_disk(path: Path) -> None:
    """Wait until what a file holds is on the disk, or the names that a folder holds, where its file system can."""
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_aside(path: Path, content: str | bytes) -> None:
    """Write a file so that it is there whole or as it was before."""
    with whole_file(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def whole_folder(place: Path) -> Iterator[Path]:
    """Give an empty folder beside `place` that replaces it when the block ends well, and vanishes otherwise.

    What it holds is on the disk before it has its name, and that is before what it replaces is removed. A link stays,
    and what it leads to is replaced. What kill -9 left beside that is named: hidden, it may fill a disk, or be all that
    is left of what was replaced.
    """
    place = followed(place)
    for state, what in (("partial", "half-written; remove it"), ("replaced", "what was there before; move it back, or "
                                                                             "remove it")):
        for left in sorted(place.parent.glob(f".{glob.escape(place.name)}.{state}-*")):
            log.warning("%s: of a run that was killed, unless one writes here now, %s", left, what)
    partial, replaced = (place.with_name(f".{place.name}.{state}-{uuid.uuid4().hex}")
                         for state in ("partial", "replaced"))
    try:
        partial.mkdir(parents=True)
        yield partial
        for path in (*partial.rglob("*"), partial):
            _bring_to_disk(path)
        if place.exists():
            place.rename(replaced)
        partial.rename(place)
        _bring_to_disk(place.parent)
    finally:
        with signals_held():
            if replaced.exists() and not place.exists():
                replaced.rename(place)
            for leftover in (partial, replaced):
                shutil.rmtree(leftover, ignore_errors=True)


def run_command(command: Sequence[str | Path], output: IO[str] | None = None) -> int:
    """Run a command and return its exit code; if this program is stopped, so is the command, which ends in peace."""
    with subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT if output else None) as process:
        try:
            return process.wait()
        except BaseException:
            process.terminate()  # leaving the block waits: a launcher has ranks to end
            raise


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _waiting
    if _held_blocks:
        _waiting = number
        return
    atexit.unregister(_say_stopped)
    atexit.register(_say_stopped, number)  # after progress bars are closed and everything is cleared away
    raise Stopped(128 + number)


def _say_stopped(number: int) -> None:
    print(f"stopped by {signal.Signals(number).name}", file=sys.stderr)
