"""What a conversion has written: each tensor held against NaN, hashed and counted on its way to the disk."""
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

from hrm_megatron.checkpoint.stream import LazyTensor
from hrm_megatron.config import ConfigError
from hrm_megatron.convert.checkpoint import EMA, RAW, Origin
from hrm_megatron.convert.safetensors_file import tensor_bytes
from hrm_megatron.program import write_aside

EXPORT_FILE = "conversion.json"
LINE_SECONDS = 10.0  # between lines about the progress where there is no terminal


@dataclass
class Ledger:
    """Notes the tensors that a writer makes, by the names that they have in the file.

    `passed` is told the bytes of each. Tensors that hold NaN or an infinity are refused, or listed in `not_finite`.
    """

    allow_nonfinite: bool = False
    passed: Callable[[int], object] = lambda size_bytes: None
    tensors: dict[str, dict[str, Any]] = field(default_factory=dict)
    not_finite: list[str] = field(default_factory=list)

    def noting(self, name: str, lazy: LazyTensor) -> LazyTensor:
        """Return the same tensor, which is noted when it is made."""
        def make() -> torch.Tensor:
            tensor = lazy.made()
            self.note(name, tensor)
            return tensor
        return LazyTensor(lazy.shape, lazy.dtype, make)

    def note(self, name: str, tensor: torch.Tensor, stored: torch.Tensor | None = None, kind: str = "") -> None:
        """Note a tensor, and the bytes of this kind that are stored for it where they are not its own."""
        if tensor.is_floating_point() and not all(end.isfinite() for end in tensor.aminmax()):  # NaN passes through it
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
        """Write the manifest of the export: `facts` about it, and dtype, shape and checksum of each tensor."""
        content = dict(**facts, tensors=dict(sorted(self.tensors.items())))
        write_aside(folder / EXPORT_FILE, json.dumps(content, indent=1) + "\n")


def tensor_digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a contiguous tensor's bytes."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()


def digests_of(folder: Path) -> Mapping[str, str]:
    """Read the checksums of an export's tensors; none if it has no manifest."""
    return _read(folder, lambda found: {name: str(facts["sha256"]) for name, facts in found["tensors"].items()}) or {}


def origin_of(folder: Path, verify: bool) -> Origin | None:
    """Read which weights a folder of weights alone holds; None if it has no manifest. A damaged one says nothing, and
    is refused unless nothing is to be verified."""
    try:
        found = _read(folder, lambda found: Origin(found.get("settings", {}).get("weights"),
                                                   int(found.get("iteration", 0))))
    except ConfigError:
        if verify:
            raise
        found = None
    # At iteration 0 both kinds are one, or the source did not say either.
    known = found and found.kind in (EMA, RAW) and found.iteration
    return found if known or found is None else Origin(None, found.iteration)


def _read[T](folder: Path, take: Callable[[Any], T]) -> T | None:
    path = folder / EXPORT_FILE
    try:
        return take(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: cannot read ({error!r}); copy the folder again, or remove this file to take the "
                          "tensors as they are") from error


def written(done_bytes: int, total_bytes: int, seconds: float) -> str:
    return f"written: {done_bytes / 1e9:.2f} of {total_bytes / 1e9:.2f} GB, {done_bytes / 1e6 / seconds:.0f} MB/s"


@contextlib.contextmanager
def progress(total: int, out: TextIO | None = None, clock: Callable[[], float] = time.monotonic,
             describe: Callable[[int, int, float], str] = written,
             **looks: Any) -> Iterator[Callable[[int], object]]:
    """Give a function that counts what is done, bytes if nothing else is said: a bar on a terminal, of such `looks`,
    elsewhere a line at times, as `describe` spells how much is done, of how much, in so many seconds."""
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
