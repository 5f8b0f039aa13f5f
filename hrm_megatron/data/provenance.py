"""What an output was made from, kept in it, so that a command that is repeated tells its own result from another's."""
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
        """What tells it from another file. A folder that was moved holds the same files."""
        return Path(self.path).name, self.num_bytes, self.modified_ns

    def __str__(self) -> str:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.modified_ns / 1e9))
        return f"{self.path} ({self.num_bytes:,} bytes, {when})"


@dataclass(frozen=True)
class Provenance:
    """Input files in their order, and the settings that decide the output besides them."""

    files: tuple[SourceFile, ...]
    settings: dict[str, Any]

    @classmethod
    def of(cls, paths: Sequence[Path], **settings: Any) -> Provenance:
        stats = [path.stat() for path in paths]
        return cls(tuple(SourceFile(str(path.absolute()), stat.st_size, stat.st_mtime_ns)
                         for path, stat in zip(paths, stats, strict=True)), settings)

    @classmethod
    def from_json(cls, value: Any) -> Provenance:
        """Read what `asdict` has spelled; raises KeyError or TypeError where it is something else."""
        return cls(tuple(SourceFile(**file) for file in value["files"]), dict(value["settings"]))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def check(self, output: str, recorded: Any) -> None:
        """Refuse, in place of this one, the output of another input or of other settings."""
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
