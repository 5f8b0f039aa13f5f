"""How the programs end: a bad input or a signal gives one line and an exit status, and leaves no half-written files."""
from __future__ import annotations

import atexit
import contextlib
import gc
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
# Errors of CUDA without memory for a context, and of cuBLAS without memory for its workspace.
CUDA_IS_FULL = re.compile("CUDA error: (out of memory|CUBLAS_STATUS_ALLOC_FAILED)")

_held_blocks = 0
_waiting: int | None = None  # the signal that arrived while signals were held


class Stopped(SystemExit):
    """Raised on a signal, to exit with status 128 + its number. `except Exception` does not catch it."""


def listen() -> None:
    """Make SIGINT, SIGTERM and SIGHUP raise `Stopped` from now on; the program then ends with one line that names the
    signal.

    Call it before slow imports: garbage is collected again when `one_line` runs the program. A signal that the caller
    ignores (nohup, a background job) stays ignored. Standard streams that the caller closed are opened on /dev/null.
    """
    gc.disable()
    _open_closed_streams()
    _handle_signals()


def collect_garbage() -> None:
    """After imports with garbage collection disabled, which take a sixth less time: exempt what was imported from
    garbage collection, and enable it."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


def _handle_signals() -> None:
    for number in STOP_SIGNALS:
        if signal.getsignal(number) not in (signal.SIG_IGN, None):  # None: not installed by Python
            signal.signal(number, _on_signal)


def _open_closed_streams() -> None:
    """Occupy the descriptors of closed standard streams: the next file opened would get one, and with it their
    output."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor
            os.set_inheritable(descriptor, True)
            mode = "w" if number else "r"
            setattr(sys, name, open(descriptor, mode, encoding="utf-8", closefd=False))  # noqa: SIM115  # it stays


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """Handle signals as `listen` does for the duration of a block that writes files, then restore the previous
    handlers."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread can set handlers
        yield
        return
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    _open_closed_streams()
    _handle_signals()
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:
                signal.signal(number, handler)


def one_line(work: Callable[[], object], refusals: tuple[type[Exception], ...] = ()) -> int:
    """Run `work` and return the exit status of the program: bad input gives one line on stderr and status 1.

    `refusals` are further exception types handled like this; so is running out of GPU memory.
    """
    expected: tuple[type[Exception], ...] = (ConfigError, OSError, *refusals)
    if isinstance(sys.stdout, io.TextIOWrapper):  # escape characters that the terminal cannot encode
        sys.stdout.reconfigure(errors="backslashreplace")
    collect_garbage()
    try:
        work()
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            raise
        except OSError as error:  # only the report failed: the work is done
            raise OSError(error.errno, error.strerror, "standard output") from error
    except BrokenPipeError:  # the reader (e.g. `head`) has closed the pipe
        _give_up_output()
        return 128 + signal.SIGPIPE
    except expected as error:
        return _refused(str(error))
    except RuntimeError as error:
        line = str(error).partition("\n")[0]
        # By name, since most of our programs do not import torch; outside torch's allocator it is a plain RuntimeError.
        if type(error).__name__ != "OutOfMemoryError" and not CUDA_IS_FULL.search(line):
            raise
        return _refused(f"GPU memory is full ({line}); free it, or hide the GPU: CUDA_VISIBLE_DEVICES=")
    return 0


def _refused(line: str) -> int:
    print(f"error: {line}", file=sys.stderr)
    _give_up_output()
    return 1


def _give_up_output() -> None:
    """Discard output that stdout does not accept: otherwise Python flushes again at exit, fails, and prints a traceback
    and sets a status of its own."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Defer signals to the end of the block, which renames or removes files and must not be interrupted."""
    if threading.current_thread() is not threading.main_thread():  # signals are handled in the main thread
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
    """Refuse output files that could not be written or that are also inputs, naming their flags. Call it before the
    work.

    Their names must end with one of `suffixes`; by default with .png for --png.
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
    """Refuse an output folder that cannot be replaced or that contains an input, naming its flag. Call it before the
    work."""
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
    """Return the first existing path among an absolute path and its parents."""
    return next(place for place in (path, *path.parents) if place.exists())


def followed(path: Path) -> Path:
    """Return the path with symlinks resolved, like `Path.resolve`, which however raises RuntimeError on symlink
    loops."""
    return Path(os.path.realpath(path))


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; the file that the block writes there replaces `path` unless the block
    raises.

    Whatever ends the program or the machine, `path` is either complete or as before. Missing parent folders are
    created. The mode is that of the replaced file, else as the umask gives. A symlink's target is replaced, not the
    link.
    """
    place = followed(path)
    partial = place.with_name(f".{place.stem}.partial-{uuid.uuid4().hex}{path.suffix}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            _bring_to_disk(partial)  # else the rename may reach the disk before the data
            if place.exists():
                shutil.copymode(place, partial)
            partial.replace(place)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        if error.filename not in (None, str(partial)):
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error  # name `path`, not the temporary


def _bring_to_disk(path: Path) -> None:
    """fsync a file, or a folder's entries where the file system supports that."""
    with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_aside(path: Path, content: str | bytes) -> None:
    """Write a file atomically: it is either complete or as before."""
    with whole_file(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def whole_folder(place: Path) -> Iterator[Path]:
    """Yield an empty folder beside `place` that replaces it when the block ends, and is removed if the block raises.

    Its contents are on the disk before it is renamed, and the replaced folder is removed only after that. Of a symlink
    the target is replaced. Hidden folders that kill -9 left beside it are reported: they take space, or are the only
    copy of what was being replaced.
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
    """Run a command and return its exit code. If this program is stopped, terminate the command and wait for its
    end."""
    with subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT if output else None) as process:
        try:
            return process.wait()
        except BaseException:
            process.terminate()  # leaving the block waits: a launcher has to end its ranks
            raise


def _on_signal(number: int, frame: FrameType | None) -> None:
    global _waiting
    if _held_blocks:
        _waiting = number
        return
    atexit.unregister(_say_stopped)
    atexit.register(_say_stopped, number)  # runs after progress bars are closed and temporary files removed
    raise Stopped(128 + number)


def _say_stopped(number: int) -> None:
    print(f"stopped by {signal.Signals(number).name}", file=sys.stderr)
