"""From jsonl files to a tokenizer, and from jsonl files and a tokenizer to an indexed dataset."""
from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from hrm_megatron.config import ConfigError
from hrm_megatron.data.example import BadRow, BadRows, Example, RowFormat, parse_example, read_jsonl
from hrm_megatron.data.indexed_examples import IndexedExamplesWriter, already_made
from hrm_megatron.data.provenance import Provenance
from hrm_megatron.data.text_files import without_mark
from hrm_megatron.data.tokenizer import (
    TextTokenizer,
    already_trained,
    check_output_folder,
    save_tokenizer,
    train_tokenizer,
)

CHUNK_BYTES = 1 << 20  # of jsonl, the work of one task
TASKS_PER_WORKER = 4  # queued ahead, so that memory does not grow with the input
ROWS = RowFormat()


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
    defaulted: int = 0
    bad_rows: list[BadRow] = field(default_factory=list)


@dataclass
class Report:
    """What a run has written and what it has left out; `defaulted` examples had no condition of their own."""

    skipped: BadRows
    examples: int = 0
    tokens: int = 0
    max_row_length: int = 0
    truncated: int = 0
    defaulted: int = 0

    def summary(self) -> str:
        """Say in one line what there is."""
        return (f"{self.examples} examples, {self.tokens} tokens, longest row {self.max_row_length} positions, "
                f"{self.truncated} responses truncated, {self.skipped.count.total()} rows skipped")

    def lines(self) -> list[str]:
        """Say what was not taken as it stands in the rows."""
        defaulted = [f"{self.defaulted} rows have no condition and took the default"] if self.defaulted else []
        return [*defaulted, *self.skipped.lines()]


def iterate_chunks(paths: Iterable[Path], chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """Cut files at line ends into pieces of about `chunk_bytes`."""
    for path in paths:
        with open(path, "rb") as file:
            start, line = 0, 1
            while piece := file.read(chunk_bytes):
                piece += file.readline()
                yield Chunk(path, line, start, len(piece))
                start, line = start + len(piece), line + piece.count(b"\n")


def encode_chunk(tokenizer: TextTokenizer, chunk: Chunk, rows: RowFormat, context_size: int) -> Encoded:
    """Spell the examples of a chunk; rows that cannot be spelled come back in `bad_rows`, in order.

    An example takes at most `context_size` positions: a longer response is cut and loses its end token.
    """
    with open(chunk.path, "rb") as file:
        file.seek(chunk.start_byte)
        text = file.read(chunk.num_bytes)
    examples: list[Example] = []
    places: list[str] = []
    bad_rows: dict[int, BadRow] = {}
    numbered = [(number, line) for number, line in enumerate(text.split(b"\n"), chunk.first_line) if without_mark(line)]
    for number, line in numbered:
        place = f"{chunk.path}:{number}"
        try:
            examples.append(parse_example(line, place, rows))
            places.append(place)
        except BadRow as error:
            bad_rows[number] = error
    prefixes = tokenizer.encode_prefixes([e.condition for e in examples], [e.instruction for e in examples])
    targets = tokenizer.encode_responses([e.response for e in examples])
    pieces: list[list[int]] = []
    truncated = defaulted = 0
    for example, place, prefix, target in zip(examples, places, prefixes, targets, strict=True):
        room = context_size + 1 - len(prefix)  # the last target token takes no position
        if room < 1:
            number = int(place.rpartition(":")[2])
            bad_rows[number] = BadRow("prefix too long", f"{place}: the prefix alone takes {len(prefix)} of "
                                      f"{context_size} positions; shorten it or raise --context-size")
            continue
        truncated += len(target) > room
        defaulted += example.defaulted
        pieces += [prefix, target[:room]]
    lengths = np.array([len(piece) for piece in pieces], np.int64).reshape(-1, 2)
    ids = np.concatenate([np.array(piece, np.int32) for piece in pieces]) if pieces else np.empty(0, np.int32)
    return Encoded(ids, lengths, truncated, defaulted, [bad_rows[number] for number in sorted(bad_rows)])


_worker_tokenizer: TextTokenizer


def _start_worker(tokenizer_path: Path) -> None:
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker_tokenizer = TextTokenizer(tokenizer_path)


def _encode_in_worker(chunk: Chunk, rows: RowFormat, context_size: int) -> Encoded:
    return encode_chunk(_worker_tokenizer, chunk, rows, context_size)


@contextlib.contextmanager
def _leave_stopping_to_us() -> Iterator[None]:
    """Start no process in here that Ctrl-C or a lost terminal reaches: this one ends them, without tracebacks."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def encode_all(chunks: Iterable[Chunk], tokenizer: TextTokenizer, workers: int, rows: RowFormat,
               context_size: int) -> Iterator[tuple[Chunk, Encoded]]:
    """Spell chunks in `workers` processes (1: in this one) and return them in their order."""
    if workers == 1:
        for chunk in chunks:
            yield chunk, encode_chunk(tokenizer, chunk, rows, context_size)
        return
    # spawn: the tokenizers library and tqdm have threads, which do not survive a fork
    context = multiprocessing.get_context("spawn")
    with _leave_stopping_to_us():
        executor = ProcessPoolExecutor(workers, context, _start_worker, (tokenizer.path,))
    with executor as pool:
        waiting: deque[tuple[Chunk, Future[Encoded]]] = deque()
        try:
            for chunk in chunks:
                with _leave_stopping_to_us():
                    waiting.append((chunk, pool.submit(_encode_in_worker, chunk, rows, context_size)))
                if len(waiting) == workers * TASKS_PER_WORKER:
                    yield waiting[0][0], waiting.popleft()[1].result()
            while waiting:
                yield waiting[0][0], waiting.popleft()[1].result()
        except BrokenProcessPool as error:
            raise ConfigError("a worker process died, often for lack of memory; choose fewer --workers") from error
        finally:
            pool.shutdown(cancel_futures=True)


def preprocess(paths: Sequence[Path], output_prefix: str | Path, tokenizer: TextTokenizer, workers: int = 1,
               rows: RowFormat = ROWS, context_size: int = 4096, skip_bad_rows: bool = False,
               overwrite: bool = False, chunk_bytes: int = CHUNK_BYTES, keep_same: bool = False) -> Report | None:
    """Write the examples of `paths`, in order, to an indexed dataset. A bad row raises BadRow unless they are skipped.

    The files do not depend on `workers`. Whatever is raised, nothing stays behind. With `keep_same` a dataset that was
    made from the same files and settings is left alone, and None returned.
    """
    for name, value in (("workers", workers), ("context-size", context_size)):
        if value < 1:
            raise ConfigError(f"--{name} {value}: must be at least 1")
    provenance = Provenance.of(paths, **_settings(rows), tokenizer=tokenizer.fingerprint, context_size=context_size)
    if keep_same and already_made(output_prefix, provenance):
        return None
    report = Report(BadRows(skip_bad_rows))
    started = time.monotonic()
    with (IndexedExamplesWriter(output_prefix, tokenizer, overwrite, provenance) as writer,
          tqdm(total=sum(path.stat().st_size for path in paths), unit="B", unit_scale=True, disable=None) as bar):
        for chunk, encoded in encode_all(iterate_chunks(paths, chunk_bytes), tokenizer, workers, rows, context_size):
            for bad_row in encoded.bad_rows:
                report.skipped.take(bad_row)
            ends = encoded.lengths.cumsum().reshape(-1, 2)
            for (middle, end), (prefix_length, _) in zip(ends.tolist(), encoded.lengths.tolist(), strict=True):
                writer.add(encoded.ids[middle - prefix_length:middle], encoded.ids[middle:end])
            report.truncated += encoded.truncated
            report.defaulted += encoded.defaulted
            report.tokens += len(encoded.ids)
            bar.update(chunk.num_bytes)
            bar.set_postfix_str(f"{report.tokens / (time.monotonic() - started):,.0f} tokens/s")
        report.examples = writer.metadata["examples"]
        report.max_row_length = writer.metadata["max_row_length"]
    return report


def _settings(rows: RowFormat) -> dict[str, object]:
    """What decides, besides the files, which examples are read. Not what happens to bad rows: where there are some,
    nothing is made unless they are skipped."""
    return {"json_keys": list(rows.keys), "default_condition": rows.default_condition}


def learn_tokenizer(paths: Sequence[Path], output: str | Path, vocab_size: int, max_chars: int = 10_000,
                    overwrite: bool = False, rows: RowFormat = ROWS, bad_rows: BadRows | None = None,
                    keep_same: bool = False) -> TextTokenizer | None:
    """Train a tokenizer on the first `max_chars` characters of every instruction and response, and save it.

    Bad rows go to `bad_rows`, else the first is raised. With `keep_same` a tokenizer that was made from the same files
    and settings is left alone, and None returned.
    """
    if max_chars < 1:
        raise ConfigError(f"--max-chars {max_chars}: must be at least 1")
    provenance = Provenance.of(paths, **_settings(rows), vocab_size=vocab_size, max_chars=max_chars)
    if keep_same and already_trained(Path(output), provenance):
        return None
    check_output_folder(Path(output), overwrite)  # before the long part

    def texts(advance: Callable[[int], object]) -> Iterator[str]:
        seen = 0
        for path in paths:
            for _, example in read_jsonl(path, rows, bad_rows):
                yield example.instruction[:max_chars]
                yield example.response[:max_chars]
                seen += 1
                advance(1)
        if not seen:
            raise ConfigError(f"no examples in {', '.join(map(str, paths))}; check --input")

    with tqdm(unit=" examples", disable=None) as bar:
        tokenizer = train_tokenizer(texts(bar.update), vocab_size)
    save_tokenizer(tokenizer, output, overwrite, provenance)
    return TextTokenizer(output)
