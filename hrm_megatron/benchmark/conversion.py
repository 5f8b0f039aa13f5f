"""Measure conversions of random weights in every direction: seconds, peak memory above that of the imports, bytes
written."""
from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from hrm_megatron.config import Architecture, ConfigError
from hrm_megatron.convert.checkpoint import PARTS, RAW, Checkpoint, Training
from hrm_megatron.convert.hf import write_hf
from hrm_megatron.convert.native import write_native
from hrm_megatron.convert.run import Conversion, convert
from hrm_megatron.convert.table import Rename, table

RANDOM = "random weights"
# (source, target, folders that are not needed afterwards).
WHOLE = ((RANDOM, "native", ()), ("native", "hf", ("hf",)), ("native", "megatron", ("native",)),
         ("megatron", "native", ("native",)), ("megatron", "hf", ("megatron",)), ("hf", "native", ("native",)),
         ("hf", "megatron", ("megatron",)), ("hf", "gguf", ("hf", "gguf")))
WEIGHTS = ((RANDOM, "hf", ()), ("hf", "megatron", ("hf",)), ("megatron", "hf", ("megatron",)),
           ("hf", "gguf", ("hf", "gguf")))
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5), clear_refs
START = """
import dataclasses, json, sys
from pathlib import Path
from hrm_megatron.parallel.cpu import activate
activate()
from hrm_megatron.benchmark.conversion import measure_here
from hrm_megatron.config import Architecture
architecture, folder, weights_only, writing = json.loads(sys.argv[1])
with open(writing, "w", buffering=1, encoding="utf-8") as answers:
    for found in measure_here(Architecture(**architecture), Path(folder), weights_only):
        print(json.dumps(dataclasses.asdict(found)), file=answers)
"""


@dataclass(frozen=True)
class Measured:
    """One direction; `peak_bytes` is the peak resident memory minus that before the conversion."""

    source: str
    target: str
    seconds: float
    peak_bytes: int
    written_bytes: int


def measure(architecture: Architecture, folder: Path, weights_only: bool = False) -> Iterator[Measured]:
    """Convert a random model of this architecture in `folder` in every direction, each in its own process.

    With `weights_only` there is no optimizer state: a fifth of the bytes. gguf is skipped if it is not installed. Most
    of what is written is deleted again.
    """
    if not CLEAR.exists():
        raise ConfigError("peak memory is read from /proc of Linux, which is not here; run this there")
    reading, writing = os.pipe()
    given = json.dumps([dataclasses.asdict(architecture), str(folder), weights_only, writing])
    # In a new process: forks of this one would hang if it has a process group, whose threads do not survive a fork.
    child = subprocess.Popen([sys.executable, "-W", "ignore", "-c", START, given], pass_fds=[writing], process_group=0)
    os.close(writing)
    try:
        with open(reading, encoding="utf-8") as answers:
            for line in answers:
                yield Measured(**json.loads(line))
        if child.wait():
            raise ConfigError(f"a conversion in {folder} failed, see above")
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def measure_here(architecture: Architecture, folder: Path, weights_only: bool) -> Iterator[Measured]:
    """Do the work of `measure` in forks of this process, which has already imported what they need."""
    for source, target, done_with in WEIGHTS if weights_only else WHOLE:
        if target == "gguf" and not find_spec("gguf"):
            continue
        ours, theirs = multiprocessing.get_context("fork").Pipe(duplex=False)
        child = multiprocessing.get_context("fork").Process(target=_measure_one, args=(
            architecture, folder, source, target, theirs))
        child.start()
        theirs.close()
        try:
            found: Measured = ours.recv()
        except EOFError:
            sys.exit(f"{source} > {target} in {folder} failed")
        finally:
            child.join()
        yield found
        for name in done_with:
            shutil.rmtree(folder / name)


def report(architecture: Architecture, folder: Path, weights_only: bool = False) -> Iterator[str]:
    """Yield the results of `measure` as lines, as they arrive."""
    largest = max(math.prod(entry.shape) for entry in table(architecture))
    yield (f"{architecture.num_parameters / 1e9:.2f} billion parameters, the largest tensor {4 * largest / 1e9:.2f} "
           f"GB, {architecture.num_parameters * 4 / 1e9:.2f} GB of weights in fp32; torch {torch.__version__}")
    yield f"{'direction':28} {'seconds':>8} {'peak GB':>8} {'written GB':>11}   beside the imports"
    for found in measure(architecture, folder, weights_only):
        yield (f"{found.source + ' > ' + found.target:28} {found.seconds:8.1f} {found.peak_bytes / 1e9:8.2f} "
               f"{found.written_bytes / 1e9:11.2f}")


def _measure_one(architecture: Architecture, folder: Path, source: str, target: str, answer: Connection) -> None:
    CLEAR.write_text(RESET_PEAK)
    before, begun = _status("VmRSS"), time.perf_counter()
    place = folder / target
    if source == RANDOM:
        checkpoint = random_checkpoint(architecture)
        write_native(checkpoint, place) if target == "native" else write_hf(checkpoint, place, RAW)
    else:
        convert(Conversion(folder / source, source, place, target, verify=False, overwrite=True))
    seconds = time.perf_counter() - begun
    written = sum(path.stat().st_size for path in place.rglob("*") if path.is_file())
    answer.send(Measured(source, target, seconds, _status("VmHWM") - before, written))


def random_checkpoint(architecture: Architecture) -> Checkpoint:
    """Return a checkpoint at step 1 whose values are drawn when they are read, deterministically."""
    def read(part: str, entry: Rename) -> torch.Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{part} {entry.megatron}".encode()))
        tensor = torch.empty(entry.shape)
        for block in tensor.view(-1).split(len(drawn)):
            torch.mul(drawn[:len(block)], 1 + torch.rand((), generator=generator), out=block)
        return tensor if entry.trained else tensor.to(torch.bfloat16)

    # Drawing every value would take longer than a conversion.
    drawn = torch.randn(1 << 20, generator=torch.Generator().manual_seed(1)) * architecture.input_std
    return Checkpoint(Path(RANDOM), architecture, Training(), 1, 0, frozenset(PARTS), read)


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", STATUS.read_text(), re.MULTILINE)
    assert found
    return 1024 * int(found[1])
