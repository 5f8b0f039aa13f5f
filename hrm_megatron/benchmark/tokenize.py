"""Benchmark tokenizing rows: our worker against Megatron's own path, alternating over the same pieces of one file."""
from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hrm_megatron.benchmark.texts import DECOMPOSED, LATER, SHARES, write_examples
from hrm_megatron.config import ConfigError
from hrm_megatron.data.engine import ENGINES
from hrm_megatron.data.example import Example, RowFormat
from hrm_megatron.data.preprocess import encode_chunk, open_in_worker
from hrm_megatron.data.readers import Piece, pieces, read_examples, read_piece
from hrm_megatron.data.tokenizer import save_tokenizer, train_tokenizer
from hrm_megatron.program import one_line

TRAINED_MEGABYTES = 8  # of similar text, to train the tokenizer
VOCABULARY = 65_536
CONTEXT = 1 << 20  # nothing is truncated
WARM_UP_PIECES = 4
FIELDS = ("instruction", "response")


class Timed(NamedTuple):
    """One piece: CPU time and result."""

    seconds: float  # CPU time of the process, independent of other load
    tokens: int
    checksum: int  # of the ids
    guarded: int
    texts: int
    peak_bytes: int


class Total(NamedTuple):
    """Results of one path over the whole file."""

    megabytes_per_second: float
    tokens: int
    guarded: float
    peak_bytes: int


_tokenizer: Any  # of a worker


def _start_ours(folder: Path, engine: str) -> None:
    global _tokenizer
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    _tokenizer = open_in_worker(folder, engine)


def _start_megatron(folder: Path) -> None:
    global _tokenizer
    from hrm_megatron.parallel.cpu import activate
    activate()
    from megatron.core.tokenizers import MegatronTokenizer
    _tokenizer = MegatronTokenizer.from_pretrained(str(folder), metadata_path={"library": "huggingface"})


def _rows_by_ours(piece: Piece) -> Timed:
    """Tokenize a piece from jsonl bytes to checked examples and ids, as tools/preprocess_data.py does."""
    before = _tokenizer.engine.guarded, _tokenizer.engine.texts
    start = time.process_time()
    encoded = encode_chunk(_tokenizer, piece, RowFormat(), CONTEXT)
    return _timed(start, encoded.ids, before)


def _texts_by_ours(piece: Piece) -> Timed:
    """Tokenize only the texts of a piece, without reading and checking them."""
    texts = [text for _, example in read_piece(piece) if isinstance(example, Example)
             for text in (example.instruction, example.response)]
    before = _tokenizer.engine.guarded, _tokenizer.engine.texts
    start = time.process_time()
    ids = _tokenizer.engine.encode(texts).ids
    return _timed(start, ids, before)


def _timed(start: float, ids: np.ndarray, before: tuple[int, int]) -> Timed:
    seconds = time.process_time() - start
    return Timed(seconds, len(ids), zlib.crc32(ids), _tokenizer.engine.guarded - before[0],
                 _tokenizer.engine.texts - before[1], _peak_bytes())


def _rows_by_megatron(piece: Piece) -> Timed:
    """Tokenize a piece as Megatron's tools/preprocess_data.py does: line by line, field by field."""
    with open(piece.path, "rb") as file:
        file.seek(piece.start_byte)  # type: ignore[attr-defined]
        lines = file.read(piece.num_bytes).splitlines()
    start = time.process_time()
    ids: list[np.ndarray] = []
    for line in lines:
        row = json.loads(line)
        ids += [np.array(_tokenizer.tokenize(row[field]), np.int32) for field in FIELDS]
    seconds = time.process_time() - start
    whole = np.concatenate(ids)
    return Timed(seconds, len(whole), zlib.crc32(whole), 0, 0, _peak_bytes())


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _sum(timed: list[Timed], text_bytes: int) -> Total:
    texts = sum(t.texts for t in timed)
    return Total(text_bytes / 1e6 / sum(t.seconds for t in timed), sum(t.tokens for t in timed),
                 sum(t.guarded for t in timed) / texts if texts else 0.0, max(t.peak_bytes for t in timed))


def learn(folder: Path, seed: int) -> None:
    """Train the tokenizer on text from another seed."""
    path = folder / "train.jsonl"
    write_examples(path, TRAINED_MEGABYTES, seed + 1)
    texts = (text for _, example in read_examples([path]) for text in (example.instruction, example.response))
    save_tokenizer(train_tokenizer(texts, VOCABULARY), folder / "tokenizer")


def measure(megabytes: float, seed: int, engine: str) -> dict[str, Total]:
    """Print and return the speed of each path per core, and the peak memory of its process."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        learn(folder, seed)
        path = folder / "examples.jsonl"
        text_bytes = write_examples(path, megabytes, seed)
        shares = ", ".join(f"{share:.0%} {script}" for script, share in SHARES.items())
        print(f"{text_bytes / 1e6:.1f} MB of generated text, seed {seed}: {shares}; {DECOMPOSED:.0%} of the texts in "
              f"NFD, {LATER:.1%} with a code point that is not assigned", flush=True)
        totals = dict(_in_turns(path, folder / "tokenizer", text_bytes, engine))
    theirs = totals["Megatron's path"]
    for name, total in totals.items():
        print(f"{name:28} {total.megabytes_per_second:8.2f} MB/s a core, "
              f"{total.megabytes_per_second / theirs.megabytes_per_second:6.1f} times Megatron's; "
              f"{total.tokens:,} tokens, {total.guarded:.2%} of the texts by tokenizers; "
              f"peak {total.peak_bytes / 1e9:.2f} GB")
    return totals


def _in_turns(path: Path, tokenizer: Path, text_bytes: int, engine: str) -> Iterator[tuple[str, Total]]:
    context = multiprocessing.get_context("spawn")
    ways = {"Megatron's path": (_rows_by_megatron, partial(_start_megatron, tokenizer)),
            "texts to ids": (_texts_by_ours, partial(_start_ours, tokenizer, engine)),
            "rows to ids, with checks": (_rows_by_ours, partial(_start_ours, tokenizer, engine))}
    pools = {name: ProcessPoolExecutor(1, context, start) for name, (_, start) in ways.items()}
    timed: dict[str, list[Timed]] = {name: [] for name in ways}
    try:
        every = list(pieces(path))
        for name, (work, _) in ways.items():  # warm-up: imports, caches, clocks
            for piece in every[:WARM_UP_PIECES]:
                pools[name].submit(work, piece).result()
        for piece in every:
            for name, (work, _) in ways.items():
                timed[name].append(pools[name].submit(work, piece).result())
    finally:
        for pool in pools.values():
            pool.shutdown(cancel_futures=True)
    for i, (theirs, ours) in enumerate(zip(timed["Megatron's path"], timed["texts to ids"], strict=True)):
        if theirs.checksum != ours.checksum:
            raise ConfigError(f"piece {i}: the ids differ; choose --tokenizer-engine tokenizers and report this")
    print(f"ids of all {len(every)} pieces are equal")
    yield from ((name, _sum(found, text_bytes)) for name, found in timed.items())


def main() -> int:
    """Run the benchmark. Workers import the main program, so this one imports only the data path."""
    parser = argparse.ArgumentParser(prog="python tools/benchmark.py tokenize", description=__doc__)
    parser.add_argument("--megabytes", type=float, default=200, help="of generated text (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer-engine", choices=ENGINES, default="auto")
    args = parser.parse_args()
    return one_line(lambda: measure(args.megabytes, args.seed, args.tokenizer_engine))


if __name__ == "__main__":
    sys.exit(main())
