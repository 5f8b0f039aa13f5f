"""Time what a run does before its first row (split, shuffle, pack, start of a process), by number of examples.

    python tools/benchmark.py plan --millions 1 10 100
"""
from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from hrm_megatron.benchmark.millions import measure_millions
from hrm_megatron.data.indexed_examples import IndexedExamples
from hrm_megatron.data.manifest import Manifest, Source, shard_folder, write_manifest
from hrm_megatron.data.mixture import Mixture, Selection
from hrm_megatron.data.plan import RowPlan, warm_up, window_for
from hrm_megatron.data.shards import HEADER, INDEX_DTYPES, MAGIC, PARTS, FileRecord, Shard
from hrm_megatron.data.shuffle import stream_key
from hrm_megatron.data.split import example_parts
from hrm_megatron.data.walk import row_lengths
from hrm_megatron.program import listen, one_line

ROW_TOKENS = 4096
SEED = 1
MEAN_TOKENS, SPREAD = 230, 1.0  # of the lognormal distribution of prefix + response
BLOCK_EXAMPLES = 1 << 20
COPIED_BYTES = 1 << 24
VOCAB_SIZE = 65_536
COLUMNS = ("examples", "split M/s", "shuffle M/s", "pack M/s", "plan M/s", "fill", "first start", "other starts",
           "resume")
# A process that opens its training and validation rows, then locates the row that the second argument selects.
START = """
import sys, time
from hrm_megatron.benchmark.plan import mixtures, spent
from hrm_megatron.data.dataset import PackedRows
wall, cpu = time.perf_counter(), time.process_time()
train, valid = mixtures(sys.argv[1])
assert valid.count_examples()["valid"]
rows, _ = (PackedRows(walk, {row_tokens}, {seed}, 1 << 40, fixed=walk is valid, cache_folder=sys.argv[1] + ".rows")
           for walk in (train, valid))
started = time.perf_counter() - wall, time.process_time() - cpu
row = eval(sys.argv[2])(rows)
wall = time.perf_counter()
rows.plan.num_rows = 0
if row is not None:
    rows.plan.locate(row)
spent(*started, time.perf_counter() - wall, len(rows.plan.rows_of_epoch(0)), rows.plan.rows_of_epoch(0).tokens)
"""


def mixtures(prefix: str) -> tuple[Mixture, Mixture]:
    """Return the training and the validation mixture of a dataset, as in a run with the default --split."""
    stores, selection = [IndexedExamples(prefix)], Selection("97,3,0", SEED)
    return Mixture(stores, ROW_TOKENS, selection), Mixture(stores, ROW_TOKENS, selection, "valid")


def spent(*found: float) -> None:
    """Print what a process measured, and its peak memory in GB."""
    # getrusage would include the parent process.
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    print(json.dumps([*found, int(peak.split()[1]) / 1e6]))


def make_dataset(prefix: Path, count: int) -> None:
    """Write a dataset of `count` examples with realistic lengths and keys; its token file is sparse."""
    folder = shard_folder(prefix)
    folder.mkdir(parents=True)
    random, tokens = np.random.default_rng(SEED), 0
    with (open(folder / "made.idx", "wb") as index, open(folder / "made.prompt_keys", "wb") as keys,
          open(folder / "starts", "w+b") as starts):
        code = next(code for code, dtype in INDEX_DTYPES.items() if dtype == np.uint16)
        index.write(HEADER.pack(MAGIC, 1, code, 2 * count, count + 1))
        for start in range(0, count, BLOCK_EXAMPLES):
            size = min(BLOCK_EXAMPLES, count - start)
            both = np.clip(random.lognormal(np.log(MEAN_TOKENS) - SPREAD**2 / 2, SPREAD, size), 4, ROW_TOKENS + 1)
            prefixes = np.clip(both * random.uniform(0.1, 0.9, size), 2, None).astype("<i4")
            lengths = np.stack([prefixes, np.maximum(both.astype("<i4") - prefixes, 2)], 1)
            lengths.tofile(index)
            begins = tokens + np.cumsum(lengths.reshape(-1), dtype=np.int64) - lengths.reshape(-1)
            (2 * begins).astype("<i8").tofile(starts)
            random.integers(0, 2**64, size, np.uint64).tofile(keys)
            tokens += int(lengths.sum(dtype=np.int64))
        starts.seek(0)
        shutil.copyfileobj(starts, index, COPIED_BYTES)
        for start in range(0, count + 1, BLOCK_EXAMPLES):
            (2 * np.arange(start, min(start + BLOCK_EXAMPLES, count + 1))).astype("<i8").tofile(index)
    (folder / "starts").unlink()
    for part, size in (("bin", 2 * tokens), ("example_keys", 16 * count)):
        with open(folder / f"made.{part}", "wb") as file:
            file.truncate(size)
    files = {part: FileRecord((folder / f"made.{part}").stat().st_size, ()) for part in PARTS}
    tokenizer = dict(tokenizer_fingerprint="made", vocab_size=VOCAB_SIZE, boq=6, eoq=7, eoa=11)
    shard = Shard("made", count, tokens, tokens // 2, ROW_TOKENS, files)
    write_manifest(prefix, Manifest(tokenizer, {}, (Source("made", 0, 0, "", shard),)), folder)


def timed(work: Callable[[], object]) -> float:
    """Return the CPU seconds of `work`, which do not depend on other load."""
    start = time.process_time()
    work()
    return time.process_time() - start


def speeds(prefix: Path, count: int) -> Iterator[float]:
    """Yield examples/s of one core: split, shuffle, pack, and the whole plan."""
    from hrm_megatron.data.kernels import best_fit, group_by_row, order_between

    store, window = IndexedExamples(prefix), window_for(ROW_TOKENS)
    warm_up(np.dtype(np.uint32))
    example_parts(4, "97,3,0", SEED, np.arange(4, dtype=np.uint64))
    order_between(0, 1, 1, stream_key(SEED))
    keys = store.prompt_keys()
    yield count / timed(lambda: example_parts(count, "97,3,0", SEED, keys))
    yield count / timed(lambda: [order_between(start, min(start + window, count), count, stream_key(SEED))
                                 for start in range(0, count, window)])
    lengths = row_lengths(*store.lengths())
    ids = np.arange(window, dtype=np.uint32)

    def pack() -> None:
        for start in range(0, count, window):
            row_of, rows = best_fit(lengths[start:start + window], ROW_TOKENS)
            group_by_row(ids[:len(row_of)], row_of, rows, stream_key(SEED, start))

    yield count / timed(pack)
    plan = RowPlan(mixtures(str(prefix))[0], ROW_TOKENS, SEED, f"{prefix}.timed")
    seconds = timed(lambda: plan.rows_of_epoch(0))
    yield len(plan.rows_of_epoch(0).example_ids) / seconds


def started(prefix: Path, row: str) -> list[float]:
    """Run a process that opens its rows and locates one; return wall and CPU seconds to open them, seconds to locate
    that row, rows and tokens of an epoch, and GB of memory."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", START.format(row_tokens=ROW_TOKENS, seed=SEED),
                           str(prefix), row], capture_output=True, text=True, check=True)
    return list(json.loads(done.stdout.splitlines()[-1]))


def measure(folder: Path, count: int) -> list[str]:
    """Return the cells of a table row."""
    prefix = folder / f"{count}" / "made"
    try:
        make_dataset(prefix, count)
        per_second = [*speeds(prefix, count)]
        *first, _, rows, tokens, first_memory = started(prefix, "lambda rows: None")
        started(prefix, "lambda rows: rows.rows_per_epoch")  # plans epoch 1
        *other, resume, _, _, memory = started(prefix, "lambda rows: rows.rows_per_epoch * 3 // 2")
        starts = ("{:.2f} s ({:.2f} s CPU), {:.2f} GB".format(*found) for found in ([*first, first_memory],
                                                                                    [*other, memory]))
        return [f"{count:,}", *(f"{speed / 1e6:.1f}" for speed in per_second),
                f"{tokens / (rows * ROW_TOKENS):.2%}", *starts, f"{resume:.3f} s"]
    finally:
        shutil.rmtree(folder / f"{count}", ignore_errors=True)


def main() -> int:
    return one_line(lambda: measure_millions("plan", __doc__, COLUMNS, measure))


if __name__ == "__main__":
    listen()
    sys.exit(main())
