"""From rows and a tokenizer to an indexed dataset."""
from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

import numpy as np
from tqdm import tqdm

from hrm_megatron.config import ConfigError
from hrm_megatron.data.example import BadRow, BadRows, Example, RowFormat
from hrm_megatron.data.indexed_examples import IndexedExamplesWriter, already_made
from hrm_megatron.data.lint import TRUNCATED, Lint
from hrm_megatron.data.provenance import Provenance
from hrm_megatron.data.raw_text import Sizes
from hrm_megatron.data.readers import PIECE_BYTES, Piece, pieces, read_piece
from hrm_megatron.data.spell import Spelled, spell
from hrm_megatron.data.tokenizer import TextTokenizer

BATCH_CHARACTERS = 1 << 21  # of text that are spelled at once, more only where one example has more
TASKS_PER_WORKER = 4  # queued ahead, so that memory does not grow with the input
ROWS = RowFormat()


@dataclass
class Encoded:
    """Ids of a piece's examples: prefix, target, prefix, target, ... in `ids`, cut by `lengths` [examples, 2].
    `noted`: what was handled on the way, by kind."""

    ids: np.ndarray
    lengths: np.ndarray
    truncated: int = 0
    defaulted: int = 0
    bad_rows: list[BadRow] = field(default_factory=list)
    noted: Counter[str] = field(default_factory=Counter)
    lint: Lint = field(default_factory=Lint)


@dataclass
class Report:
    """What a run has written and what it has left out; `defaulted` examples had no condition of their own, and
    `noted` is what was handled on the way."""

    skipped: BadRows
    examples: int = 0
    tokens: int = 0
    max_row_length: int = 0
    truncated: int = 0
    defaulted: int = 0
    noted: Counter[str] = field(default_factory=Counter)
    lint: Lint = field(default_factory=Lint)

    def summary(self) -> str:
        """Say in one line what there is."""
        return (f"{self.examples} examples, {self.tokens} tokens, longest row {self.max_row_length} positions, "
                f"{self.truncated} responses truncated, {self.skipped.count.total()} rows skipped")

    def lines(self) -> list[str]:
        """Say what was not taken as it stands in the rows."""
        defaulted = [f"{self.defaulted} rows have no condition and took the default"] if self.defaulted else []
        return [*defaulted, *(f"{count} {what}" for what, count in sorted(self.noted.items())), *self.skipped.lines(),
                *self.lint.lines()]


def encode_chunk(tokenizer: TextTokenizer, piece: Piece, rows: RowFormat, context_size: int,
                 lint: bool = True) -> Encoded:
    """Spell the examples of a piece; rows that cannot be spelled come back in `bad_rows`, in order.

    An example takes at most `context_size` positions: a longer response is cut and loses its end token.
    """
    encoded = Encoded(np.empty(0, np.int32), np.empty((0, 2), np.int64))
    sizes = Sizes(context_size, lambda texts: tokenizer.engine.encode(texts).lengths.tolist())
    spelled: list[Spelled] = []
    for batch in _batches(read_piece(piece, rows, encoded.noted, sizes)):
        placed = [(place, example) for place, example in batch if isinstance(example, Example)]
        batch_spelled = spell(tokenizer, [example for _, example in placed], context_size)
        spelled.append(batch_spelled)
        encoded.truncated += len(batch_spelled.truncated)
        if lint:
            encoded.lint.look(str(piece.path), placed, tokenizer.hidden_strings)
            for i in batch_spelled.truncated:
                encoded.lint.add(TRUNCATED, placed[i][0])
        lengths = zip(batch_spelled.prefix_lengths, batch_spelled.fits, strict=True)
        for place, example in batch:
            if isinstance(example, BadRow):
                encoded.bad_rows.append(example)
                continue
            prefix_length, fits = next(lengths)
            if not fits:
                encoded.bad_rows.append(BadRow(
                    "prefix too long", f"{place}: the prefix alone takes {prefix_length} of {context_size} positions; "
                    "shorten it or raise --context-size"))
                continue
            encoded.defaulted += example.defaulted
    encoded.ids = np.concatenate([part.ids for part in spelled])
    encoded.lengths = np.concatenate([part.lengths for part in spelled])
    return encoded


def _batches(read: Iterable[tuple[str, Example | BadRow]]) -> Iterator[list[tuple[str, Example | BadRow]]]:
    """Cut what was read into batches of bounded length: rows of compressed files can be far longer than the files."""
    batch: list[tuple[str, Example | BadRow]] = []
    characters = 0
    for place, example in read:
        batch.append((place, example))
        if isinstance(example, Example):
            characters += len(example.instruction) + len(example.response)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    yield batch


_worker_tokenizer: TextTokenizer


def _start_worker(tokenizer_path: Path, engine: str) -> None:
    global _worker_tokenizer
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _worker_tokenizer = TextTokenizer(tokenizer_path, engine)


def _encode_in_worker(piece: Piece, rows: RowFormat, context_size: int, lint: bool) -> Encoded:
    return encode_chunk(_worker_tokenizer, piece, rows, context_size, lint)


@contextlib.contextmanager
def _leave_stopping_to_us() -> Iterator[None]:
    """Start no process in here that Ctrl-C or a lost terminal reaches: this one ends them, without tracebacks."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def encode_all(chunks: Iterable[Piece], tokenizer: TextTokenizer, workers: int, rows: RowFormat,
               context_size: int, lint: bool = True) -> Iterator[tuple[Piece, Encoded]]:
    """Spell chunks in `workers` processes (1: in this one) and return them in their order."""
    if workers == 1:
        for chunk in chunks:
            yield chunk, encode_chunk(tokenizer, chunk, rows, context_size, lint)
        return
    # spawn: the tokenizers library and tqdm have threads, which do not survive a fork
    context = multiprocessing.get_context("spawn")
    with _leave_stopping_to_us():
        executor = ProcessPoolExecutor(workers, context, _start_worker, (tokenizer.path, tokenizer.engine_choice))
    with executor as pool:
        waiting: deque[tuple[Piece, Future[Encoded]]] = deque()
        try:
            for chunk in chunks:
                with _leave_stopping_to_us():
                    waiting.append((chunk, pool.submit(_encode_in_worker, chunk, rows, context_size, lint)))
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
               overwrite: bool = False, chunk_bytes: int = PIECE_BYTES, keep_same: bool = False,
               lint: str = "warn") -> Report | None:
    """Write the examples of `paths`, in order, to an indexed dataset. A bad row raises BadRow unless they are skipped.

    The files do not depend on `workers`. Whatever is raised, nothing stays behind. With `keep_same` a dataset that was
    made from the same files and settings is left alone, and None returned. `lint` is one of `LINT`.
    """
    for name, value in (("workers", workers), ("context-size", context_size)):
        if value < 1:
            raise ConfigError(f"--{name} {value}: must be at least 1")
    provenance = Provenance.of(paths, **rows.settings(), tokenizer=tokenizer.fingerprint, context_size=context_size)
    if keep_same and already_made(output_prefix, provenance):
        return None
    report = Report(BadRows(skip_bad_rows))
    chunks = chain.from_iterable(pieces(path, chunk_bytes, rows) for path in paths)
    started = time.monotonic()
    with (IndexedExamplesWriter(output_prefix, tokenizer, overwrite, provenance) as writer,
          tqdm(total=sum(path.stat().st_size for path in paths), unit="B", unit_scale=True, disable=None) as bar):
        for chunk, encoded in encode_all(chunks, tokenizer, workers, rows, context_size, lint != "off"):
            for bad_row in encoded.bad_rows:
                report.skipped.take(bad_row)
            ends = encoded.lengths.cumsum().reshape(-1, 2)
            for (middle, end), (prefix_length, _) in zip(ends.tolist(), encoded.lengths.tolist(), strict=True):
                writer.add(encoded.ids[middle - prefix_length:middle], encoded.ids[middle:end])
            report.truncated += encoded.truncated
            report.defaulted += encoded.defaulted
            report.noted += encoded.noted
            report.lint.merge(encoded.lint)
            if lint == "error":
                report.lint.refuse(whole=False)
            report.tokens += len(encoded.ids)
            bar.update(chunk.num_bytes)
            bar.set_postfix_str(f"{report.tokens / (time.monotonic() - started):,.0f} tokens/s")
        if lint == "error":
            report.lint.refuse()
        report.examples = writer.metadata["examples"]
        report.max_row_length = writer.metadata["max_row_length"]
    return report
