"""The record of one start: code, command, versions, data and nodes of a run."""
from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hrm_megatron
from hrm_megatron.config import DATA_FLAGS

PACKAGES = ("hrm_megatron", "torch", "megatron-core", "transformer-engine", "flash-attn", "nvidia-nccl-cu13")
KEPT_VARIABLES = re.compile(r"^(NCCL_|TORCH_|TORCHELASTIC_|NVTE_|CUDA_|OMP_|SLURM_JOB_(ID|NAME|NODELIST|PARTITION)$)")


def describe_start(arguments: Sequence[str], nodes: Sequence[str]) -> dict[str, Any]:
    """Return a description of this start, in addition to what training records (arguments.txt, the checkpoints'
    manifests)."""
    root = Path(hrm_megatron.__file__).parents[1]
    return {
        "begun": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "git_commit": _git(root, "rev-parse", "HEAD"),
        "uncommitted_files": (_git(root, "status", "--porcelain") or "").splitlines(),
        "arguments": list(arguments),
        "nodes": list(nodes),
        "versions": {"python": platform.python_version()} | {
            package: version for package in PACKAGES if (version := _version(package))},
        "data_sha256": dict(_data(arguments)),
        "environment": {name: value for name, value in sorted(os.environ.items()) if KEPT_VARIABLES.match(name)},
    }


def _data(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (path, SHA-256) of each dataset's manifest, which names its shards by content, or of a folder's
    metadata.json."""
    flag = ""
    for argument in arguments:
        if argument.startswith("--"):
            flag, _, argument = argument.partition("=")
        if flag not in DATA_FLAGS or not argument:
            continue
        for place in (Path(f"{argument}.json"), Path(argument) / "metadata.json"):
            if place.is_file():
                yield str(place), hashlib.sha256(place.read_bytes()).hexdigest()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(root: Path, *command: str) -> str | None:
    try:
        done = subprocess.run(["git", "-c", "safe.directory=*", "-C", root, *command], capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
