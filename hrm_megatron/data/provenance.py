"""What an output was made from, stored in it, so that a repeated command can tell its own result from another."""
from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from hrm_megatron.config import ConfigError

WAY_OUT = "name another output, or replace this one with --overwrite"


@dataclass(frozen=True)
class SourceFile:
    """An input file as it was read."""

    path: str
    num_bytes: int
    modified_ns: int

    @property
    def identity(self) -> tuple[str, int, int]:
        """Name, size and modification time; not the folder, which may have been moved."""
        return Path(self.path).name, self.num_bytes, self.modified_ns

    def __str__(self) -> str:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.modified_ns / 1e9))
        return f"{self.path} ({self.num_bytes:,} bytes, {when})"


@dataclass(frozen=True)
class Provenance:
    """The input files in order, and all other settings that decide the output."""

    files: tuple[SourceFile, ...]
    settings: dict[str, Any]

    @classmethod
    def of(cls, paths: Sequence[Path], **settings: Any) -> Provenance:
        stats = [path.stat() for path in paths]
        return cls(tuple(SourceFile(str(path.absolute()), stat.st_size, stat.st_mtime_ns)
                         for path, stat in zip(paths, stats, strict=True)), settings)

    @classmethod
    def from_json(cls, value: Any) -> Provenance:
        """Read the result of `to_json`; raises KeyError or TypeError if it is something else."""
        return cls(tuple(SourceFile(**file) for file in value["files"]), dict(value["settings"]))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def check(self, output: str, recorded: Any) -> None:
        """Raise ConfigError unless `recorded` has the same input files and settings as this."""
        try:
            theirs = Provenance.from_json(recorded)
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{output} does not say what it was made from; {WAY_OUT}") from error
        for have, want in zip_longest(theirs.files, self.files):
            if have is None or want is None or have.identity != want.identity:
                raise ConfigError(f"{output} was made from {have or 'fewer files'}, not from "
                                  f"{want or f'{len(self.files)} files'}; {WAY_OUT}")
        for name in sorted({*theirs.settings, *self.settings}):
            old, new = theirs.settings.get(name), self.settings.get(name)
            if old != new:
                raise ConfigError(f"{output} was made with {name}={old!r}, not {new!r}; {WAY_OUT}")
