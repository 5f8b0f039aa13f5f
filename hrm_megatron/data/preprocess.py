"""Rows and a tokenizer to an indexed dataset."""
from __future__ import annotations

import contextlib
import gc
import logging
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from operator import itemgetter
from pathlib import Path

import numpy as np

from hrm_megatron.config import ConfigError
from hrm_megatron.data.dataset_folder import DatasetFolder, Task
from hrm_megatron.data.encoded import Encoded
from hrm_megatron.data.example import BadRow, RowFormat
from hrm_megatron.data.incremental import Input, Update, list_inputs, share_of
from hrm_megatron.data.lint import TRUNCATED, UNKNOWN
from hrm_megatron.data.manifest import facts_of
from hrm_megatron.data.progress import Progress
from hrm_megatron.data.raw_text import Sizes
from hrm_megatron.data.readers import PIECE_BYTES, Piece, pieces, read_batches
from hrm_megatron.data.run_report import Report
from hrm_megatron.data.spell import Spelled, spell
from hrm_megatron.data.text_keys import TextKeys
from hrm_megatron.data.tokenizer import TextTokenizer

WORKERS_PER_READER = 4  # a reader decompresses 150 MB/s of Parquet or more, a worker encodes 25 MB/s
MAX_READERS = 3  # a strongly compressed row group takes 256 MB while it is read
TASKS_PER_WORKER = 4  # queued ahead; bounded, so that memory does not grow with the input
ROWS = RowFormat()

log = logging.getLogger(__name__)


def encode_chunk(tokenizer: TextTokenizer, piece: Piece, rows: RowFormat, context_size: int,
                 lint: bool = True) -> Encoded:
    """Encode the examples of a piece; rows that cannot be encoded are returned in `bad_rows`, in order.

    An example takes at most `context_size` positions: a longer response is cut and loses its end token.
    """
    encoded = Encoded(np.empty(0, np.int32), np.empty((0, 2), np.int64))
    sizes = Sizes(context_size, lambda texts: [len(target) - 1 for target in tokenizer.encode_responses(texts)])
    spelled: list[Spelled] = []
    keys = TextKeys()
    for batch in read_batches(piece, rows, encoded.noted, sizes):
        batch_spelled = spell(tokenizer, batch.conditions, batch.texts, context_size)
        spelled.append(batch_spelled)
        encoded.truncated += len(batch_spelled.truncated)
        if lint:
            encoded.lint.look(str(piece.path), batch, tokenizer.hidden_strings)
            if tokenizer.unknown is not None:
                encoded.lint.add_texts(UNKNOWN, batch, batch_spelled.holding(tokenizer.unknown))
            for i in batch_spelled.truncated:
                encoded.lint.add(TRUNCATED, batch.place(i))
        too_long = [(i, BadRow("prefix too long", f"{batch.place(i)}: the prefix alone takes {prefix_length} of "
                                                  f"{context_size} positions; shorten it or raise --context-size"))
                    for i, prefix_length in batch_spelled.too_long]
        encoded.bad_rows += [row for _, row in sorted([*batch.bad_rows, *too_long], key=itemgetter(0))]
        encoded.defaulted += sum(batch.defaulted[i] for i in batch_spelled.kept)
        keys.add(batch, batch_spelled.kept)
    encoded.ids = np.concatenate([part.ids for part in spelled])
    encoded.lengths = np.concatenate([part.lengths for part in spelled])
    encoded.prompt_keys, encoded.example_keys = keys.arrays()
    return encoded


_worker_tokenizer: TextTokenizer


def _start_worker(tokenizer_path: Path, engine: str) -> None:
    global _worker_tokenizer
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.getLogger("hrm_megatron").setLevel(logging.ERROR)  # the parent process has already logged the warnings
    _worker_tokenizer = open_in_worker(tokenizer_path, engine)


def open_in_worker(tokenizer_path: Path, engine: str) -> TextTokenizer:
    """Load the tokenizer in a process that does nothing else."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    tokenizer = TextTokenizer(tokenizer_path, engine)
    gc.freeze()  # exempt imports from garbage collection: scanning them took a sixth of the time
    return tokenizer


def _end_with_parent() -> None:
    """Exit when the parent exits: a killed parent sends no signal, and workers would wait for pieces forever."""
    parent = multiprocessing.parent_process()
    assert parent
    parent.join()
    os._exit(1)


def _encode_in_worker(piece: Piece, rows: RowFormat, context_size: int, lint: bool) -> Encoded:
    return encode_chunk(_worker_tokenizer, piece, rows, context_size, lint)


@contextlib.contextmanager
def _leave_stopping_to_us() -> Iterator[None]:
    """Start child processes with SIGINT and SIGHUP blocked: the parent ends them, so that they print no tracebacks."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGHUP))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def encode_all(chunks: Iterable[Piece], tokenizer: TextTokenizer, workers: int, rows: RowFormat,
               context_size: int, lint: bool = True) -> Generator[tuple[Piece, Encoded]]:
    """Encode chunks in `workers` processes (1: in this one) and yield the results in order."""
    if workers == 1:
        for chunk in chunks:
            yield chunk, encode_chunk(tokenizer, chunk, rows, context_size, lint)
        return
    # spawn: threads of the tokenizers library and tqdm do not survive a fork
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
               overwrite: bool = False, chunk_bytes: int = PIECE_BYTES, names: Sequence[str] | None = None,
               task: Task | None = None, merge: bool = False, lint: str = "warn",
               beside: Callable[[], object] = lambda: None) -> Report | None:
    """Bring the dataset at `output_prefix` up to date with `paths`, in order: one shard for each source, identified by
    its name.

    A bad row raises BadRow unless bad rows are skipped. The files do not depend on `workers`. If anything is raised,
    finished sources are kept and nothing else, and the previous dataset stays in place. As one `task` of several, make
    the shards of its share and return None unless it is the last to finish; `merge` refuses to make any. `lint`: one of
    `LINT`. `beside` writes files that belong to the dataset; it is called once all shards exist, before PREFIX.json
    changes.
    """
    for name, value in (("workers", workers), ("context-size", context_size)):
        if value < 1:
            raise ConfigError(f"--{name} {value}: must be at least 1")
    settings = {**rows.settings(), "tokenizer": tokenizer.fingerprint, "context_size": context_size}
    inputs = list_inputs(paths, names)
    folder = DatasetFolder(output_prefix, task)

    def encode(paths: Sequence[Path]) -> Generator[tuple[Piece, Encoded]]:
        readers = min(MAX_READERS, -(-workers // WORKERS_PER_READER))
        chunks = chain.from_iterable(pieces(path, chunk_bytes, rows, readers) for path in paths)
        return encode_all(chunks, tokenizer, workers, rows, context_size, lint != "off")

    def look(compared: Sequence[Input]) -> Update:
        return Update(folder, inputs, compared, facts_of(tokenizer), settings, skip_bad_rows, overwrite, lint)

    def report(update: Update) -> Report:
        return Report(update.complete(beside), update.changes, progress.seconds, progress.read_bytes, progress.tokens)

    mine = share_of(inputs, task) if task else inputs
    if lint != "off" and (loss := tokenizer.loss()):
        log.warning("%s", loss)
    with folder.held(), Progress() as progress:
        update = look(compared=mine)
        if merge and (missing := update.missing()):
            raise ConfigError(f"{len(missing)} of {len(inputs)} sources have no shard in {folder.shards} yet, the "
                              f"first {missing[0].name}; run the --shard tasks that make them, or leave out --merge")
        progress.begin(sum(given.num_bytes for given in mine if given.name not in update.done))
        update.make(mine, encode, progress.made)
        if task is None:
            return report(update)
    with folder.held_by_last() as last:
        if last and not (update := look(compared=())).missing():
            return report(update)
    return None
