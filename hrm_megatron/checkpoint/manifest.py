"""`manifest.json`: what an iteration's folder held when its save was done, written after everything else.

It covers what the CRC32s inside the tensor files do not, so writing it reads hardly anything of a checkpoint.
"""
from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hrm_megatron.checkpoint.archive import WAY_OUT, DamagedError, file_digest, frame_digest, naming
from hrm_megatron.program import write_aside

MANIFEST_FILE = "manifest.json"
TRACKER_FILE = "latest_checkpointed_iteration.txt"  # Megatron's, beside the iterations: the last complete one
ARGUMENTS_FILE = "arguments.txt"  # beside the iterations, or else beside the TensorBoard log: the arguments of the run
STARTED_IN = "started_in"  # in it: the folder to which relative paths in arguments refer
ABANDONED = "abandoned"  # (.2, .3 ...) folder beside the iterations: those that the run has rolled back from
METADATA_FILE = ".metadata"  # of torch.distributed.checkpoint
TENSORS = ".distcp"  # suffix of the files that hold tensors and states, each stored by torch.save


@dataclass(frozen=True)
class FileRecord:
    """Size and SHA-256 of a file; for a tensor file, the digest of everything that its CRC32s leave out."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What was saved: `save` counts the saves into the surrounding folder; file names are relative to `folder`."""

    folder: Path
    iteration: int
    save: int
    settings: Mapping[str, Any]
    files: Mapping[str, FileRecord]

    def check_sizes(self, rank: int = 0, ranks: int = 1) -> None:
        """Raise DamagedError unless all files, or this rank's share of them, exist with the recorded sizes."""
        for name, record in [*self.files.items()][rank::ranks]:
            place = self.folder / name
            if (size := size_of(place)) != record.size_bytes:
                state = "not there" if size is None else f"{size} bytes long"
                raise DamagedError(f"{place}: {state}, {MANIFEST_FILE} says {record.size_bytes} bytes; {WAY_OUT}")

    def check_file(self, name: str) -> None:
        """Raise DamagedError unless this file has the recorded digest."""
        self._compare(name, describe(self.folder / name))

    def check_contents(self, name: str, contents: bytes) -> None:
        """Do the same for contents that have already been read."""
        self._compare(name, FileRecord(len(contents), hashlib.sha256(contents).hexdigest()))

    def _compare(self, name: str, found: FileRecord) -> None:
        if found != self.files.get(name):
            raise DamagedError(f"{self.folder / name}: not what was written there ({MANIFEST_FILE} says otherwise); "
                               f"{WAY_OUT}")


def size_of(path: Path) -> int | None:
    """Return the size of a regular file, None if there is none, with a single stat: storage serves many ranks."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def describe(path: Path) -> FileRecord:
    """Return the record of one file; raise DamagedError if it cannot be read or is not the kind that its name says."""
    with naming(path):
        return FileRecord(path.stat().st_size, (frame_digest if path.suffix == TENSORS else file_digest)(path))


def write_manifest(folder: Path, iteration: int, settings: Mapping[str, Any], files: Mapping[str, FileRecord]) -> None:
    """Write the manifest of an iteration's folder atomically."""
    others = (read_manifest(path.parent, or_none=True) for path in folder.parent.glob(f"*/{MANIFEST_FILE}"))
    saves = [other.save for other in others if other and other.folder != folder]
    content = dict(iteration=iteration, save=max(saves, default=0) + 1, settings=dict(settings),
                   files={name: asdict(record) for name, record in sorted(files.items())})
    write_aside(folder / MANIFEST_FILE, json.dumps({**content, "sha256": _digest(content)}, indent=1) + "\n")


def describe_folder(folder: Path, beside: Iterable[str] = (),
                    known: Mapping[str, FileRecord] | None = None) -> dict[str, FileRecord]:
    """Return the records of all files in a folder and `beside` it; `known` ones are not read again."""
    # Files whose names begin with a dot are temporary, except .metadata.
    names = {path.name for path in folder.iterdir() if path.is_file() and path.name != MANIFEST_FILE
             and (path.name == METADATA_FILE or not path.name.startswith("."))}
    files = dict(known or {})
    return {name: files.get(name) or describe(folder / name) for name in sorted({*names, *beside})}


def read_manifest(folder: Path, or_none: bool = False) -> Manifest | None:
    """Read the manifest of a folder; None if it has none or, with `or_none`, if the manifest is damaged."""
    place = folder / MANIFEST_FILE
    try:
        content = json.loads(place.read_text(encoding="utf-8"))
        stated = content.pop("sha256")
        if stated == _digest(content):
            files = {name: FileRecord(**record) for name, record in content.pop("files").items()}
            return Manifest(folder, files=files, **content)
        reason = "its contents do not have the digest that it ends with"
    except FileNotFoundError:
        return None
    except OSError as error:
        reason = error.strerror or "cannot read"
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        reason = str(error)
    if or_none:
        return None
    raise DamagedError(f"{place}: damaged ({reason}); {WAY_OUT}")


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
