"""From jsonl files to a tokenizer, and from jsonl files and a tokenizer to a store."""
from __future__ import annotations

import multiprocessing
import os
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from hrm_megatron.config import ConfigError
from hrm_megatron.data.example import FIELDS, BadRow, Example, parse_example, read_jsonl
from hrm_megatron.data.store import StoreWriter
from hrm_megatron.data.tokenizer import TextTokenizer, check_output_folder, save_tokenizer, train_tokenizer

CHUNK_BYTES = 1 << 20  # of jsonl, the work of one task
TASKS_PER_WORKER = 4  # queued ahead, so that memory does not grow with the input


class Chunk(NamedTuple):
    """Consecutive lines of a file."""

    path: Path
    first_line: int
    start_byte: int
    num_bytes: int


@dataclass
class Encoded:
    """Ids of a chunk's examples: prefix, target, prefix, target, ... in `ids`, cut by `lengths` [examples, 2]."""

    ids: np.ndarray
    lengths: np.ndarray
    truncated: int = 0
    bad_rows: list[BadRow] = field(default_factory=list)


@dataclass
class Report:
    """What a run has written and what it has left out."""

    examples: int = 0
    tokens: int = 0
    max_row_length: int = 0
    truncated: int = 0
    skipped: Counter[str] = field(default_factory=Counter)
    first_skipped: dict[str, str] = field(default_factory=dict)

    def summary(self) -> str:
        """Say in one line what there is."""
        return (f"{self.examples} examples, {self.tokens} tokens, longest row {self.max_row_length} positions, "
                f"{self.truncated} responses truncated, {self.skipped.total()} rows skipped")

    def skipped_lines(self) -> list[str]:
        """Say per kind of bad row how many there were, and the first of them."""
        return [f"skipped {self.skipped[kind]}: {kind}, first {self.first_skipped[kind]}"
                for kind in sorted(self.skipped)]


def iterate_chunks(paths: Iterable[Path], chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """Cut files at line ends into pieces of about `chunk_bytes`."""
    for path in paths:
        with open(path, "rb") as file:
            start, line = 0, 1
            while piece := file.read(chunk_bytes):
                piece += file.readline()
                yield Chunk(path, line, start, len(piece))
                start, line = start + len(piece), line + piece.count(b"\n")


def encode_chunk(tokenizer: TextTokenizer, chunk: Chunk, keys: Sequence[str], context_size: int) -> Encoded:
    """Spell the examples of a chunk; rows that cannot be spelled come back in `bad_rows`, in order.

    An example takes at most `context_size` positions: a longer response is cut and loses its end token.
    """
    with open(chunk.path, "rb") as file:
        file.seek(chunk.start_byte)
        text = file.read(chunk.num_bytes)
    examples: list[Example] = []
    places: list[str] = []
    bad_rows: dict[int, BadRow] = {}
    numbered = [(number, line) for number, line in enumerate(text.split(b"\n"), chunk.first_line) if line.strip()]
    for number, line in numbered:
        place = f"{chunk.path}:{number}"
        try:
            examples.append(parse_example(line, place, keys))
            places.append(place)
        except BadRow as error:
            bad_rows[number] = error
    prefixes = tokenizer.encode_prefixes([e.condition for e in examples], [e.instruction for e in examples])
    targets = tokenizer.encode_responses([e.response for e in examples])
    pieces: list[list[int]] = []
    truncated = 0
    for place, prefix, target in zip(places, prefixes, targets, strict=True):
        room = context_size + 1 - len(prefix)  # the last target token takes no position
        if room < 1:
            number = int(place.rpartition(":")[2])
            bad_rows[number] = BadRow("prefix too long", f"{place}: the prefix alone takes {len(prefix)} of "
                                      f"{context_size} positions; shorten it or raise --context-size")
            continue
        truncated += len(target) > room
        pieces += [prefix, target[:room]]
    lengths = np.array([len(piece) for piece in pieces], np.int64).reshape(-1, 2)
    ids = np.concatenate([np.array(piece, np.int32) for piece in pieces]) if pieces else np.empty(0, np.int32)
    return Encoded(ids, lengths, truncated, [bad_rows[number] for number in sorted(bad_rows)])


_worker_tokenizer: TextTokenizer


def _start_worker(tokenizer_path: Path) -> None:
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker_tokenizer = TextTokenizer(tokenizer_path)


def _encode_in_worker(chunk: Chunk, keys: Sequence[str], context_size: int) -> Encoded:
    return encode_chunk(_worker_tokenizer, chunk, keys, context_size)


def encode_all(chunks: Iterable[Chunk], tokenizer: TextTokenizer, workers: int, keys: Sequence[str],
               context_size: int) -> Iterator[tuple[Chunk, Encoded]]:
    """Spell chunks in `workers` processes (1: in this one) and return them in their order."""
    if workers == 1:
        for chunk in chunks:
            yield chunk, encode_chunk(tokenizer, chunk, keys, context_size)
        return
    # spawn: the tokenizers library and tqdm have threads, which do not survive a fork
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _start_worker, (tokenizer.path,)) as pool:
        waiting: deque[tuple[Chunk, Future[Encoded]]] = deque()
        try:
            for chunk in chunks:
                waiting.append((chunk, pool.submit(_encode_in_worker, chunk, keys, context_size)))
                if len(waiting) == workers * TASKS_PER_WORKER:
                    yield waiting[0][0], waiting.popleft()[1].result()
            while waiting:
                yield waiting[0][0], waiting.popleft()[1].result()
        except BrokenProcessPool as error:
            raise ConfigError("a worker process died, often for lack of memory; choose fewer --workers") from error
        finally:
            pool.shutdown(cancel_futures=True)


def preprocess(paths: Sequence[Path], output_prefix: str | Path, tokenizer: TextTokenizer, workers: int = 1,
               keys: Sequence[str] = FIELDS, context_size: int = 4096, skip_bad_rows: bool = False,
               overwrite: bool = False, chunk_bytes: int = CHUNK_BYTES) -> Report:
    """Write the examples of `paths`, in order, to a store. A bad row raises BadRow unless they are skipped.

    The files do not depend on `workers`. Whatever is raised, nothing stays behind.
    """
    for name, value in (("workers", workers), ("context-size", context_size)):
        if value < 1:
            raise ConfigError(f"--{name} {value}: must be at least 1")
    report = Report()
    started = time.monotonic()
    with (StoreWriter(output_prefix, tokenizer, overwrite) as writer,
          tqdm(total=sum(path.stat().st_size for path in paths), unit="B", unit_scale=True, disable=None) as bar):
        for chunk, encoded in encode_all(iterate_chunks(paths, chunk_bytes), tokenizer, workers, keys, context_size):
            for bad_row in encoded.bad_rows:
                if not skip_bad_rows:
                    raise bad_row
                report.skipped[bad_row.kind] += 1
                report.first_skipped.setdefault(bad_row.kind, str(bad_row))
            ends = encoded.lengths.cumsum().reshape(-1, 2)
            for (middle, end), (prefix_length, _) in zip(ends.tolist(), encoded.lengths.tolist(), strict=True):
                writer.add(encoded.ids[middle - prefix_length:middle], encoded.ids[middle:end])
            report.truncated += encoded.truncated
            report.tokens += len(encoded.ids)
            bar.update(chunk.num_bytes)
            bar.set_postfix_str(f"{report.tokens / (time.monotonic() - started):,.0f} tokens/s")
        report.examples = writer.metadata["examples"]
        report.max_row_length = writer.metadata["max_row_length"]
    return report


def learn_tokenizer(paths: Sequence[Path], output: str | Path, vocab_size: int, max_chars: int = 10_000,
                    overwrite: bool = False) -> TextTokenizer:
    """Train a tokenizer on the first `max_chars` characters of every instruction and response, and save it."""
    if max_chars < 1:
        raise ConfigError(f"--max-chars {max_chars}: must be at least 1")
    check_output_folder(Path(output), overwrite)  # before the long part

    def texts(advance: Callable[[int], object]) -> Iterator[str]:
        seen = 0
        for path in paths:
            for _, example in read_jsonl(path):
                yield example.instruction[:max_chars]
                yield example.response[:max_chars]
                seen += 1
                advance(1)
        if not seen:
            raise ConfigError(f"no examples in {', '.join(map(str, paths))}; check --input")

    with tqdm(unit=" examples", disable=None) as bar:
        tokenizer = train_tokenizer(texts(bar.update), vocab_size)
    save_tokenizer(tokenizer, output, overwrite)
    return TextTokenizer(output)
