"""Check at the start that all ranks have the same code, data and checkpoint; otherwise they would silently train
nonsense."""
from __future__ import annotations

import hashlib
import importlib.metadata
import math
import platform
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

import hrm_megatron
from hrm_megatron.config import ConfigError
from hrm_megatron.training.error_file import RestartableError

PACKAGES = ("torch", "megatron-core")  # whose version is part of the code
SAMPLES, SAMPLE_BYTES = 64, 1 << 16  # of a large file
WAYS_OUT = {"code": "install the same version of hrm_megatron, megatron-core and torch on every node",
            "data": "let every node read the same files",
            "checkpoint": "let every node see one --load, and no other run save there; then start again"}


def digest(paths: Iterable[Path]) -> str:
    """Return the SHA-256 of the names, sizes and bytes of files; of a large file 64 blocks of 64 KiB, evenly spaced."""
    hashed = hashlib.sha256()
    for path in sorted(paths):
        size = path.stat().st_size
        hashed.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            for sample in range(min(SAMPLES, math.ceil(size / SAMPLE_BYTES))):
                if size > SAMPLES * SAMPLE_BYTES:
                    file.seek((size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
                hashed.update(file.read(SAMPLE_BYTES))
    return hashed.hexdigest()


def fingerprint(data_files: Iterable[Path], start: Path | None) -> dict[str, str]:
    """Return this process's node, digests of its code and data, and the iteration that it resumes from."""
    root = Path(hrm_megatron.__file__).parent
    versions = " ".join(f"{package} {importlib.metadata.version(package)}" for package in PACKAGES)
    return dict(node=platform.node(), data=digest(data_files), checkpoint=str(start or ""),
                code=f"{versions} python {sys.version_info[:2]} {digest(root.rglob('*.py'))}")


def check_agreement(data_files: Iterable[Path], start: Path | None) -> None:
    """Compare all ranks with rank 0; raise ConfigError on every rank if one differs."""
    mine = fingerprint(data_files, start)
    everyone: list[dict[str, str]] = [mine] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    compare(everyone)


def compare(everyone: Sequence[dict[str, str]]) -> None:
    """Raise ConfigError that names the ranks whose code, data or checkpoint is not rank 0's."""
    first = everyone[0]
    for what, way_out in WAYS_OUT.items():
        others = [rank for rank, theirs in enumerate(everyone) if theirs[what] != first[what]]
        if others:
            nodes = sorted({everyone[rank]["node"] for rank in others})
            kind = RestartableError if what == "checkpoint" else ConfigError
            raise kind(f"the {what} of {len(others)} of {len(everyone)} ranks, the first of them {others[0]} (on "
                       f"{', '.join(nodes[:8])}{' ...' * (len(nodes) > 8)}), is not that of rank 0 (on "
                       f"{first['node']}): {way_out}")
