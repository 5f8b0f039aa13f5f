"""Measure time and memory of the search for duplicates, by number of examples, each in its own process.

    python tools/benchmark.py deduplicate --millions 1 10
"""
from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from hrm_megatron.benchmark.millions import measure_millions
from hrm_megatron.benchmark.plan import BLOCK_EXAMPLES, SEED, make_dataset
from hrm_megatron.config import ConfigError
from hrm_megatron.data.deduplicate import check_duckdb
from hrm_megatron.data.manifest import shard_folder
from hrm_megatron.data.shards import KEY
from hrm_megatron.program import listen, one_line

COLUMNS = ("examples", "duplicates", "by the clock", "CPU", "peak memory")
DRAWN_FROM = 3  # times as many texts as examples: about 15 % of the examples are duplicates
MIXING = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F)  # odd, so that different texts have different keys
START = """
import sys, time
from hrm_megatron.benchmark.plan import spent
from hrm_megatron.data.deduplicate import deduplicate
from hrm_megatron.data.indexed_examples import IndexedExamples
store = IndexedExamples(sys.argv[1])
wall, cpu = time.perf_counter(), time.process_time()
found = deduplicate(store)
spent(found.duplicates, time.perf_counter() - wall, time.process_time() - cpu)
"""


def draw_keys(prefix: Path, count: int) -> int:
    """Write keys of randomly drawn texts for the examples of a synthetic dataset; return the number of duplicates."""
    random = np.random.default_rng(SEED)
    drawn = np.zeros(DRAWN_FROM * count, bool)
    with open(shard_folder(prefix) / "made.example_keys", "wb") as file:
        for start in range(0, count, BLOCK_EXAMPLES):
            texts = random.integers(0, len(drawn), min(BLOCK_EXAMPLES, count - start), np.uint64)
            drawn[texts] = True
            np.stack([texts * np.uint64(factor) for factor in MIXING], 1).astype(KEY).tofile(file)
    return count - int(drawn.sum())


def measure(folder: Path, count: int) -> list[str]:
    """Return the cells of a table row; raises ConfigError if the number of duplicates found is wrong."""
    prefix = folder / f"{count}" / "made"
    try:
        make_dataset(prefix, count)
        duplicates = draw_keys(prefix, count)
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", START, str(prefix)], capture_output=True,
                              text=True, check=True)
        found, seconds, of_core, memory = json.loads(done.stdout.splitlines()[-1])
        if found != duplicates:
            raise ConfigError(f"{found} duplicates were found of {duplicates}; please report this")
        return [f"{count:,}", f"{found:,}", f"{seconds:.1f} s", f"{of_core:.1f} s", f"{memory:.2f} GB"]
    finally:
        shutil.rmtree(folder / f"{count}", ignore_errors=True)


def main() -> int:
    return one_line(lambda: measure_millions("deduplicate", __doc__, COLUMNS, measure, check_duckdb))


if __name__ == "__main__":
    listen()
    sys.exit(main())
