"""Console output: our own lines go to the terminal, what Megatron prints goes to a file in the run's folder.

Facts, logged under `hrm_megatron` before step 1, are collected and shown as one block by `begin`. Rank 0 shows the
facts; the last rank, on which Megatron has the results too, shows everything after them.
"""
from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from hrm_megatron.checkpoint.manifest import ARGUMENTS_FILE, STARTED_IN
from hrm_megatron.config import ConfigError
from hrm_megatron.parallel.log_levels import is_unactionable_print
from hrm_megatron.program import write_aside
from hrm_megatron.training.console_lines import NO_TERMINAL_WIDTH, facts_block

LOG_FILE = "megatron.rank{}.log"
# Printed lines of Megatron that a user should see: the run stops, or does not do what it was told.
ATTENTION = re.compile(r"^\W*(?:warning|error)\b|\bexiting\b|termination requested|is deprecated|could not|unable to",
                       re.IGNORECASE)


class Bar(tqdm):  # type: ignore[type-arg]
    """Progress bar at the bottom of a terminal, redrawn after each step and without tqdm's monitor thread."""

    monitor_interval = 0


class LineStream(io.TextIOBase):
    """A replacement for stdout that passes complete lines to `take`."""

    def __init__(self, take: Callable[[str], None], stands_in_for: TextIO) -> None:
        self.take, self.stock, self.begun = take, stands_in_for, ""

    def write(self, text: str) -> int:
        *lines, self.begun = (self.begun + text).split("\n")
        for line in lines:
            self.take(line)
        return len(text)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.stock.fileno()


class Console(contextlib.AbstractContextManager["Console"]):
    """Redirects stdout and logging during a run."""

    def __init__(self, rank: int, ranks: int) -> None:
        self.rank, self.first, self.last = rank, not rank, rank == ranks - 1
        self.out, self.err = sys.stdout, sys.stderr
        self.facts: list[str] = []
        self.held: list[str] = []  # what Megatron printed before its destination was known
        self.log: TextIO | None = None
        self.folder: Path | None = None
        self.settled = self.verbose = self.begun = False
        self.bar: Bar | None = None
        self.restore = contextlib.ExitStack()

    def __enter__(self) -> Console:
        stream = LineStream(self._megatron_printed, self.out)
        self.restore.enter_context(contextlib.redirect_stdout(stream))
        root, own = logging.getLogger(), logging.getLogger("hrm_megatron")
        for handler in root.handlers:  # Megatron's, which writes to stdout (training/log_handler.py)
            if isinstance(handler, logging.StreamHandler) and handler.stream is self.out:
                handler.setStream(LineStream(self._to_log, self.out))
                self.restore.callback(handler.setStream, self.out)
        for logger, handler in ((root, _Told(logging.WARNING, self._warned)), (own, _Told(logging.INFO, self._told))):
            logger.addHandler(handler)
            self.restore.callback(logger.removeHandler, handler)
        self.restore.callback(setattr, own, "propagate", own.propagate)
        self.restore.callback(own.setLevel, own.level)
        own.propagate = False
        own.setLevel(logging.INFO)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close_bar()
        if kind is None or not issubclass(kind, ConfigError):  # a refused command prints one line and leaves no file
            if not self.settled:  # --help, or an unexpected error
                self.settle(None, verbose=True)
            elif self.facts:
                self.line(facts_block(self.facts, self.wrapped))
            if kind is not None and not self.begun:
                self._open_files({})
        self.restore.close()

    def settle(self, folder: str | None, verbose: bool) -> None:
        """Decide where Megatron's output goes; `begin` creates the files, once the run can no longer be refused."""
        self.settled, self.folder, self.verbose = True, Path(folder) if folder else None, verbose
        if self.first:
            place = f"in {folder}" if folder else "nowhere without --save or --tensorboard-dir (--verbose prints them)"
            self.facts.append(f"log: arguments and what Megatron prints are {'below' if verbose else place}")
        held, self.held = self.held, []
        for line in held:
            self._megatron_printed(line)

    def answer(self, lines: Iterable[str], verbose: bool) -> None:
        """Show the facts so far and these lines, for a command that starts no run."""
        said, self.facts = self.facts, []
        self.settle(None, verbose)
        self.facts.clear()  # drop the fact about the log's place
        for line in (*([facts_block(said, self.wrapped)] if said else ()), *lines) if self.first else ():
            self.line(line)

    def begin(self, arguments: dict[str, object]) -> None:
        """Show the facts as one block: the next line is about step 1."""
        self._open_files(arguments)
        if self.first:
            self.line(facts_block(self.facts, self.wrapped))
        self.facts.clear()

    @property
    def width(self) -> int:
        """Columns of the terminal, or NO_TERMINAL_WIDTH without one."""
        if not self.out.isatty():
            return NO_TERMINAL_WIDTH
        return os.get_terminal_size(self.out.fileno()).columns or 80

    @property
    def wrapped(self) -> int | None:
        """Columns to which facts are wrapped; None without a terminal, because programs search whole lines."""
        return self.width if self.out.isatty() else None

    def line(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self.bar is not None:
            self.bar.clear()
        print(text, file=self.out, flush=True)
        if self.bar is not None:
            self.bar.refresh()

    def progress(self, step: int, steps: int) -> None:
        """Advance the progress bar, if there is a terminal."""
        if self.bar is None:
            terminal = next((stream for stream in (self.out, self.err) if stream.isatty()), None)
            if terminal is None:
                return
            self.bar = Bar(total=steps, initial=step - 1, file=terminal, dynamic_ncols=True, leave=False, miniters=1,
                           bar_format="{percentage:3.0f}% |{bar}| step {n_fmt}/{total_fmt}, {elapsed} so far")
        self.bar.update(step - self.bar.n)

    def close_bar(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _told(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            self.line(f"{self._who}{record.levelname.lower()}: {record.getMessage()}")
        elif self.first and self.begun:
            self.line(record.getMessage())
        elif self.first:  # each unindented line is a fact; repeated ones are dropped
            self.facts += [fact for fact in re.split(r"\n(?! )", record.getMessage()) if fact not in self.facts]

    def _warned(self, record: logging.LogRecord) -> None:
        if not self.verbose:  # else Megatron's output contains it
            self.line(f"{self._who}{record.levelname}:{record.name}:{record.getMessage()}")

    @property
    def _who(self) -> str:
        return "" if self.first else f"rank {self.rank}: "

    def _megatron_printed(self, line: str) -> None:
        self._to_log(line)
        if self.settled and not self.verbose and ATTENTION.search(line) and not is_unactionable_print(line):
            self.line(self._who + line.strip())

    def _to_log(self, line: str) -> None:
        if not self.settled or not (self.begun or self.verbose):
            self.held.append(line)
        elif self.verbose:
            self.line(line)
        elif self.log:
            try:
                print(line, file=self.log, flush=True)
            except OSError as error:
                self._close_log()
                self.line(f"{self._who}warning: {self.folder}: no more of Megatron's log here ({error.strerror})")

    def _close_log(self) -> None:
        """Stop writing Megatron's log, ignoring errors: on a full disk, closing retries the failed write."""
        stream, self.log = self.log, None
        if stream:
            with contextlib.suppress(OSError):
                stream.close()

    def _open_files(self, arguments: dict[str, object]) -> None:
        self.begun = True
        try:
            if self.folder and (self.first or self.last):
                self.folder.mkdir(parents=True, exist_ok=True)
                if not self.verbose:
                    self.log = open(self.folder / LOG_FILE.format(self.rank), "a", encoding="utf-8")  # noqa: SIM115
                    self.restore.callback(self._close_log)
            if self.folder and self.first and arguments:
                listed = {**arguments, STARTED_IN: Path.cwd()}
                write_aside(self.folder / ARGUMENTS_FILE, "".join(
                    f"{name} {'.' * (48 - len(name))} {value}\n" for name, value in sorted(listed.items())))
        except OSError as error:
            raise ConfigError(f"{self.folder}: cannot keep the run's log there ({error.strerror}); mend that, or "
                              "choose another --save or --tensorboard-dir") from error
        held, self.held = self.held, []
        for line in held:
            self._to_log(line)


class _Told(logging.Handler):
    def __init__(self, level: int, take: Callable[[logging.LogRecord], None]) -> None:
        super().__init__(level)
        self.take = take

    def emit(self, record: logging.LogRecord) -> None:
        self.take(record)
