"""`manifest.json`: what was in the folder of an iteration when its save was done, written behind everything else.

It covers what the CRC32s inside the files of tensors do not, so that writing it reads next to nothing of a checkpoint.
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
TRACKER_FILE = "latest_checkpointed_iteration.txt"  # Megatron's, beside the iterations: the one that is whole
ABANDONED = "abandoned"  # (.2, .3 ...) folder beside the iterations: those that the run has gone back from
METADATA_FILE = ".metadata"  # of torch.distributed.checkpoint
TENSORS = ".distcp"  # ends the names of files of tensors and states, each of them stored by torch.save


@dataclass(frozen=True)
class FileRecord:
    """Size and SHA-256 of a file; where tensors are in it, the digest of all that their CRC32s leave out."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What was saved: `save` counts the saves into the folder around it; names are relative to `folder`."""

    folder: Path
    iteration: int
    save: int
    settings: Mapping[str, Any]
    files: Mapping[str, FileRecord]

    def check_sizes(self, rank: int = 0, ranks: int = 1) -> None:
        """Raise DamagedError unless all files, or this rank's share of them, are there and as long as they were."""
        for name, record in [*self.files.items()][rank::ranks]:
            place = self.folder / name
            if (size := size_of(place)) != record.size_bytes:
                state = "not there" if size is None else f"{size} bytes long"
                raise DamagedError(f"{place}: {state}, {MANIFEST_FILE} says {record.size_bytes} bytes; {WAY_OUT}")

    def check_file(self, name: str) -> None:
        """Raise DamagedError unless the digest of this file is the one that was written down."""
        self._compare(name, describe(self.folder / name))

    def check_contents(self, name: str, contents: bytes) -> None:
        """Do the same for a file whose contents have been read already."""
        self._compare(name, FileRecord(len(contents), hashlib.sha256(contents).hexdigest()))

    def _compare(self, name: str, found: FileRecord) -> None:
        if found != self.files.get(name):
            raise DamagedError(f"{self.folder / name}: not what was written there ({MANIFEST_FILE} says otherwise); "
                               f"{WAY_OUT}")


def size_of(path: Path) -> int | None:
    """Return the bytes of a file, None where there is none, by one question: storage has many ranks to answer."""
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return found.st_size if stat.S_ISREG(found.st_mode) else None


def describe(path: Path) -> FileRecord:
    """Describe one file; raise DamagedError if it cannot be read, or is not the kind of file that its name says."""
    with naming(path):
        return FileRecord(path.stat().st_size, (frame_digest if path.suffix == TENSORS else file_digest)(path))


def write_manifest(folder: Path, iteration: int, settings: Mapping[str, Any], files: Mapping[str, FileRecord]) -> None:
    """Write the manifest of the folder of an iteration, whole or not at all."""
    others = (read_manifest(path.parent, or_none=True) for path in folder.parent.glob(f"*/{MANIFEST_FILE}"))
    saves = [other.save for other in others if other and other.folder != folder]
    content = dict(iteration=iteration, save=max(saves, default=0) + 1, settings=dict(settings),
                   files={name: asdict(record) for name, record in sorted(files.items())})
    write_aside(folder / MANIFEST_FILE, json.dumps({**content, "sha256": _digest(content)}, indent=1) + "\n")


def describe_folder(folder: Path, beside: Iterable[str] = (),
                    known: Mapping[str, FileRecord] | None = None) -> dict[str, FileRecord]:
    """Describe the files of a folder and those `beside` it that belong to it, but not again those that are known."""
    # A name that begins with a dot, but for one, is of no file that outlives its writer.
    names = {path.name for path in folder.iterdir() if path.is_file() and path.name != MANIFEST_FILE
             and (path.name == METADATA_FILE or not path.name.startswith("."))}
    files = dict(known or {})
    return {name: files.get(name) or describe(folder / name) for name in sorted({*names, *beside})}


def read_manifest(folder: Path, or_none: bool = False) -> Manifest | None:
    """Read the manifest of a folder; None if it has none or, `or_none`, if that is damaged."""
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
