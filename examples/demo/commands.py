"""Run command lines as a user would: they are shown, fully logged, partly echoed, and stopped with the demo."""
from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from hrm_megatron.program import signals_held

TAIL_LINES = 20
LAUNCHER_REPORTS = " failed (exitcode: "  # torchrun's output from here on is long and not the cause
GRACE_SECONDS = 10  # between SIGTERM and SIGKILL, for a launcher and its ranks
WIDTH = 110

Watch = Callable[[str], str | None]  # a line of output > what is shown of it, or None


class CommandFailed(Exception):
    """A command failed; the message has its last lines and the place of the whole output."""


def python(*arguments: str | Path) -> list[str]:
    """Return a command with this interpreter, by its relative path if possible."""
    executable, here = Path(sys.executable), Path.cwd()
    name = executable.relative_to(here) if executable.is_relative_to(here) else executable
    return [str(name), *map(str, arguments)]


def flags(**values: object) -> list[str]:
    """Return settings as command-line flags."""
    return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def shown(command: list[str]) -> str:
    """Return a command in shell syntax, wrapped with a few flags per line."""
    pieces: list[str] = []
    for word in map(shlex.quote, command):
        if word.startswith("--") or not pieces:
            pieces.append(word)
        else:
            pieces[-1] += f" {word}"
    lines = [pieces[0]]
    for piece in pieces[1:]:
        if len(lines[-1]) + len(piece) < WIDTH:
            lines[-1] += f" {piece}"
        else:
            lines.append(f"    {piece}")
    return " \\\n  ".join(lines)


def run(command: list[str], log: Path, watch: Watch = lambda line: None) -> None:
    """Print the command, run it, append its output to `log` and print what `watch` returns for each line.

    Raises CommandFailed. On any exception, Ctrl-C included, the command and its children have ended.
    """
    print(f"  $ {shown(command)}", flush=True)
    last: deque[str] = deque(maxlen=TAIL_LINES)
    reported = False
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with open(log, "a", encoding="utf-8") as file, _ended(subprocess.Popen(
            # A new session: Ctrl-C reaches it once, through us, so that a launcher can end its ranks cleanly.
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            errors="replace", env=environment, start_new_session=True)) as process:
        file.write(f"$ {shlex.join(command)}\n")
        assert process.stdout
        for line in process.stdout:
            file.write(line)
            file.flush()
            reported |= LAUNCHER_REPORTS in line
            if not reported:
                last.append(line)
            if text := watch(line):
                print(f"  {text}", flush=True)
        if process.wait():
            raise CommandFailed(f"this command ended with status {process.returncode}; its last words:\n"
                                f"{''.join(last)}(all of its output is in {log})")


@contextlib.contextmanager
def _ended(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """Yield a process; at the end of the block it and its children have ended."""
    try:
        yield process
    finally:
        if process.poll() is None:
            _stop(psutil.Process(process.pid))
        process.wait()


@signals_held()  # else a second Ctrl-C would leave ranks running
def _stop(launcher: psutil.Process) -> None:
    alive = [launcher, *launcher.children(recursive=True)]
    for send in (psutil.Process.terminate, psutil.Process.kill):
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                send(process)
        _, alive = psutil.wait_procs(alive, GRACE_SECONDS)
