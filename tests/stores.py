"""Datasets of token ids for tests, among them the older form as Megatron's own writer makes it."""
from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hrm_megatron.data.indexed_examples import IndexedExamples, IndexedExamplesWriter
from hrm_megatron.data.split import PARTS, example_parts, prompts_for_empty_parts


class FakeTokenizer:
    fingerprint, boq, eoq, eoa = "f" * 64, 6, 7, 11

    def __init__(self, vocab_size=300):
        self.vocab_size = vocab_size


def megatron():
    from hrm_megatron.parallel.cpu import activate
    activate()
    from megatron.core.datasets import indexed_dataset
    return indexed_dataset


def write_store(prefix: Path, examples: Iterable, tokenizer=None) -> None:
    with IndexedExamplesWriter(prefix, tokenizer or FakeTokenizer()) as writer:
        for prefix_ids, target_ids in examples:
            writer.add(np.array(prefix_ids), np.array(target_ids))


def write_single(prefix: Path, examples: list, vocab_size=300) -> None:
    """Write PREFIX.bin, PREFIX.idx and PREFIX.json, as versions before shards did."""
    dtype = np.uint16 if vocab_size <= 65_536 else np.int32
    builder = megatron().IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for prefix_ids, target_ids in examples:
        builder.add_document(np.array([*prefix_ids, *target_ids]), [len(prefix_ids), len(target_ids)])
    builder.finalize(f"{prefix}.idx")
    lengths = [len(p) + len(t) for p, t in examples]
    Path(f"{prefix}.json").write_text(json.dumps(
        dict(tokenizer_fingerprint="f" * 64, vocab_size=vocab_size, boq=6, eoq=7, eoa=11, examples=len(examples),
             tokens=sum(lengths), max_row_length=max(lengths) - 1)))


def files_of(prefix: Path) -> dict[str, bytes]:
    """The manifest and the shards: what a dataset is, without the lock."""
    paths = [Path(f"{prefix}.json"), *Path(f"{prefix}.shards").glob("[!.]*")]
    return {path.name: path.read_bytes() for path in sorted(paths)}


def examples_of(prefix: Path) -> list[tuple[list[int], list[int]]]:
    store = IndexedExamples(prefix)
    return [tuple(part.tolist() for part in store[i]) for i in range(len(store))]


def part_of(prefix: Path, part: str) -> Path:
    """A file of the only shard."""
    path, = Path(f"{prefix}.shards").glob(f"*.{part}")
    return path


class Split(NamedTuple):
    """Example ids of each part, ascending."""

    train: np.ndarray
    valid: np.ndarray
    test: np.ndarray


def split_examples(count: int, split: str, seed: int, prompt_keys: np.ndarray | None = None) -> Split:
    """Divide examples by `example_parts`."""
    parts = example_parts(count, split, seed, prompt_keys,
                          prompts_for_empty_parts([(count, prompt_keys)], split, seed))
    return Split(*(np.flatnonzero(parts == part) for part in range(len(PARTS))))
