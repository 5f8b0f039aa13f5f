"""Exact deduplication of a dataset in bounded memory: writes a list of the examples to keep beside it."""
from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hrm_megatron.config import ConfigError
from hrm_megatron.data.dataset_folder import DatasetFolder
from hrm_megatron.data.indexed_examples import IndexedExamples
from hrm_megatron.data.kept_examples import write_kept

MEMORY = "1GB"  # limit of duckdb; what does not fit is spilled to a folder among the shards
BLOCK_EXAMPLES = 1 << 20
FETCHED_EXAMPLES = 1 << 16
# All examples with the same keys but the first.
LATER_ONES = ("SELECT id FROM keys JOIN (SELECT a, b, min(id) AS first FROM keys GROUP BY a, b HAVING count(*) > 1) "
              "USING (a, b) WHERE id <> first")


@dataclass(frozen=True)
class Deduplicated:
    """Number of examples of a dataset, and how many of them are later duplicates."""

    examples: int
    duplicates: int

    def __str__(self) -> str:
        return (f"{self.duplicates} of {self.examples} examples are duplicates of an earlier one and left out of "
                f"training, {self.examples - self.duplicates} are kept")


def deduplicate(store: IndexedExamples, threads: int = 1) -> Deduplicated:
    """Keep the first of all examples with the same condition, instruction and response, by 128 bits of BLAKE2b.

    Replaces an earlier list and copies no data. The dataset is locked meanwhile.
    """
    if store.manifest is None:
        raise ConfigError(f"{store.prefix}: written by an older version, without the keys of its examples; preprocess "
                          "it again to deduplicate")
    kept = np.ones(len(store), bool)
    folder = DatasetFolder(store.prefix)
    with folder.held():
        with contextlib.closing(_later_ones(store, threads, folder.scratch / "deduplicate")) as later:
            for ids in later:
                kept[ids] = False
        found = Deduplicated(len(store), int(len(store) - kept.sum()))
        write_kept(store, kept, {"examples": found.examples, "duplicates": found.duplicates})
    return found


def check_duckdb() -> None:
    """Raise ConfigError if duckdb is not installed, before hours of other work."""
    if not importlib.util.find_spec("duckdb"):
        raise ConfigError("--deduplicate needs duckdb, which is not installed; pip install 'hrm-megatron[deduplicate]'")


def _later_ones(store: IndexedExamples, threads: int, folder: Path) -> Generator[np.ndarray]:
    """Yield ids of examples whose keys an earlier one has; `folder` is created, for data that exceeds memory."""
    check_duckdb()
    import duckdb
    import pyarrow

    try:
        folder.mkdir()
        with duckdb.connect(folder / "keys", config={"memory_limit": MEMORY, "threads": threads,
                                                     "preserve_insertion_order": False,
                                                     "temp_directory": str(folder / "spilled")}) as database:
            database.execute("SET enable_progress_bar = false")  # it would mix with the lines of the report
            database.execute("CREATE TABLE keys (id UBIGINT, a UBIGINT, b UBIGINT)")
            for start in range(0, len(store), BLOCK_EXAMPLES):
                block = store.example_keys(start, min(start + BLOCK_EXAMPLES, len(store)))
                assert block is not None
                ids = np.arange(start, start + len(block), dtype=np.uint64)
                database.register("block", pyarrow.table({"id": ids, "a": np.ascontiguousarray(block[:, 0]),
                                                          "b": np.ascontiguousarray(block[:, 1])}))
                database.execute("INSERT INTO keys SELECT * FROM block")
            database.execute(LATER_ONES)
            while found := database.fetchmany(FETCHED_EXAMPLES):
                yield np.array(found, np.int64)[:, 0]
    except (OSError, duckdb.Error) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{folder}: cannot deduplicate ({reason}); free some space") from error
