"""A record of what a conversion writes: each tensor is checked for NaN, hashed and counted on its way to the disk."""
from __future__ import annotations

import contextlib
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from tqdm import tqdm

from hrm_megatron.checkpoint.archive import DamagedError
from hrm_megatron.checkpoint.stream import LazyTensor
from hrm_megatron.config import ConfigError
from hrm_megatron.convert.checkpoint import EMA, RAW, Origin
from hrm_megatron.convert.safetensors_file import tensor_bytes
from hrm_megatron.program import write_aside

EXPORT_FILE = "conversion.json"
OWN_DIGEST = "sha256"  # in it: of the rest of it
WAY_OUT = f"copy the folder again, or remove {EXPORT_FILE} if it was changed on purpose"
LINE_SECONDS = 10.0  # between progress lines without a terminal


@dataclass
class Ledger:
    """Records the tensors that a writer creates, under their names in the file.

    `passed` is called with the bytes of each. Tensors with NaN or infinities are refused, or, with `allow_nonfinite`,
    listed in `not_finite`. `deciding` names the files that decide, with the tensors, what the export computes.
    """

    allow_nonfinite: bool = False
    passed: Callable[[int], object] = lambda size_bytes: None
    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)
    not_finite: list[str] = field(default_factory=list)
    deciding: list[str] = field(default_factory=list)

    def noting(self, name: str, lazy: LazyTensor) -> LazyTensor:
        """Return the same lazy tensor, which is recorded when it is created."""
        def make() -> torch.Tensor:
            tensor = lazy.made()
            self.note(name, tensor)
            return tensor
        return LazyTensor(lazy.shape, lazy.dtype, make)

    def note(self, name: str, tensor: torch.Tensor, stored: torch.Tensor | None = None, kind: str = "") -> None:
        """Record a tensor; `stored` are the bytes of this `kind` that the file holds for it, if not its own."""
        if tensor.is_floating_point() and not all(end.isfinite() for end in tensor.aminmax()):  # aminmax propagates NaN
            if not self.allow_nonfinite:
                count = int((~tensor.isfinite()).sum())
                raise ConfigError(f"{name}: {count} of {tensor.numel()} numbers are NaN or infinite; choose an earlier "
                                  "checkpoint, or pass --allow-nonfinite to write them as they are")
            self.not_finite.append(name)
        stored = tensor if stored is None else stored
        self.tensors[name] = dict(dtype=kind or str(tensor.dtype).removeprefix("torch."), shape=list(tensor.shape),
                                  sha256=tensor_digest(stored))
        self.passed(stored.nbytes)

    def write(self, folder: Path, **facts: object) -> None:
        """Write conversion.json: `facts` about the export, dtype, shape and checksum of each tensor, and checksums of
        `deciding` files and of itself. Call it after all other files are written."""
        files = {name: _file_digest(folder / name) for name in self.deciding}
        content = dict(**facts, files=files, tensors=dict(sorted(self.tensors.items())))
        write_aside(folder / EXPORT_FILE, json.dumps(content | {OWN_DIGEST: _digest(content)}, indent=1) + "\n")


def tensor_digest(tensor: torch.Tensor) -> str:
    """Return the SHA-256 of a contiguous tensor's bytes."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def check_settings(folder: Path) -> None:
    """Refuse an export whose settings or tokenizer are not those that its conversion.json records, as it does since
    they have checksums."""
    for name, digest in (_read(folder, lambda found: dict(found.get("files", {}))) or {}).items():
        path = folder / Path(name).name
        if not path.is_file():
            raise DamagedError(f"{path}: is missing, and was exported ({EXPORT_FILE}); {WAY_OUT}")
        if _file_digest(path) != digest:
            raise DamagedError(f"{path}: is not what was exported ({EXPORT_FILE} says otherwise); {WAY_OUT}")


def _file_digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest(content: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def digests_of(folder: Path) -> Mapping[str, str]:
    """Read the checksums of an export's tensors; empty if it has no conversion.json."""
    return _read(folder, lambda found: {name: str(facts["sha256"]) for name, facts in found["tensors"].items()}) or {}


def origin_of(folder: Path, verify: bool) -> Origin | None:
    """Read which weights a weights-only folder holds; None if it has no record. With `verify`, refuse a damaged one."""
    found = _noted(folder, verify, lambda found: Origin(found.get("settings", {}).get("weights"),
                                                        int(found.get("iteration", 0))))
    # At iteration 0 both kinds are equal, or the source did not record it either.
    known = found and found.kind in (EMA, RAW) and found.iteration
    return found if known or found is None else Origin(None, found.iteration)


def setting_of(folder: Path, name: str, verify: bool) -> object:
    """Read a setting that a weights-only folder records, else None; a damaged record as in `origin_of`."""
    return _noted(folder, verify, lambda found: found.get("settings", {}).get(name))


def _noted[T](folder: Path, verify: bool, take: Callable[[Any], T]) -> T | None:
    try:
        return _read(folder, take)
    except ConfigError:
        if verify:
            raise
        return None


def _read[T](folder: Path, take: Callable[[Any], T]) -> T | None:
    path = folder / EXPORT_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        own = found.pop(OWN_DIGEST, None)  # exports of older versions have none
        if own not in (None, _digest(found)):
            raise DamagedError(f"{path}: is not what was written there; {WAY_OUT}")
        return take(found)
    except FileNotFoundError:
        return None
    except DamagedError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: cannot read ({error!r}); copy the folder again, or remove this file to take the "
                          "tensors as they are") from error


def written(done_bytes: int, total_bytes: int, seconds: float) -> str:
    return f"written: {done_bytes / 1e9:.2f} of {total_bytes / 1e9:.2f} GB, {done_bytes / 1e6 / seconds:.0f} MB/s"


@contextlib.contextmanager
def progress(total: int, out: TextIO | None = None, clock: Callable[[], float] = time.monotonic,
             describe: Callable[[int, int, float], str] = written,
             **looks: Any) -> Iterator[Callable[[int], object]]:
    """Yield a callback that counts what is done, by default bytes: a tqdm bar with options `looks` on a terminal,
    otherwise a line formatted by `describe(done, total, seconds)` at most every LINE_SECONDS."""
    out = out or sys.stderr
    if out.isatty():
        with tqdm(total=total, file=out, **(looks or dict(unit="B", unit_scale=True))) as bar:
            yield bar.update
        return
    begun = said = clock()
    done = 0

    def passed(more: int) -> None:
        nonlocal said, done
        done += more
        if (now := clock()) - said >= LINE_SECONDS:
            said = now
            out.write(f"{describe(done, total, now - begun)}\n")
            out.flush()
    yield passed
