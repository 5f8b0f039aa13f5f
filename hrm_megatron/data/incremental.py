"""Bring a dataset up to date with its sources: unchanged sources are kept, and finished ones survive any failure."""
from __future__ import annotations

import contextlib
import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from threading import Event
from typing import Any

from hrm_megatron.config import ConfigError
from hrm_megatron.data.dataset_folder import DatasetFolder, Task
from hrm_megatron.data.encoded import Encoded
from hrm_megatron.data.example import BadRows
from hrm_megatron.data.lint import Lint
from hrm_megatron.data.manifest import (
    READING,
    Left,
    Manifest,
    Source,
    check_names,
    check_settings,
    manifest_path,
    read_manifest,
    write_manifest,
)
from hrm_megatron.data.readers import Piece
from hrm_megatron.data.shards import ShardWriter
from hrm_megatron.program import signals_held

SHOWN_NAMES = 5
READ_BYTES = 1 << 20

log = logging.getLogger(__name__)

Encode = Callable[[Sequence[Path]], Generator[tuple[Piece, Encoded]]]


@dataclass(frozen=True)
class Input:
    """A source file as it was when the run began."""

    name: str
    path: Path
    num_bytes: int
    modified_ns: int

    @classmethod
    def of(cls, name: str, path: Path) -> Input:
        stat = path.stat()
        return cls(name, path, stat.st_size, stat.st_mtime_ns)


def list_inputs(paths: Sequence[Path], names: Sequence[str] | None = None) -> list[Input]:
    """Stat the sources; without `names` they are named after their files."""
    names = names or [path.name for path in paths]
    check_names(names, paths)
    return [Input.of(name, path) for name, path in zip(names, paths, strict=True)]


def share_of(inputs: Sequence[Input], task: Task) -> list[Input]:
    """Return a task's sources, independent of what is finished: largest first, each to the least loaded task."""
    loads = [0] * task.count
    mine = set()
    for at in sorted(range(len(inputs)), key=lambda at: (-inputs[at].num_bytes, at)):
        least = loads.index(min(loads))
        loads[least] += inputs[at].num_bytes + 1  # + 1: empty files are distributed too
        if least == task.number:
            mine.add(at)
    return [inputs[at] for at in sorted(mine)]


@dataclass
class Changes:
    """Names of the sources by what changed since the existing manifest."""

    kept: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    mended: list[str] = field(default_factory=list)  # made again: damaged shard, or bad rows
    removed: list[str] = field(default_factory=list)

    def add(self, given: Input, before: Source | None, now: Source | None, made: bool) -> None:
        """Classify a source: `before` is its manifest entry, `now` the current one; `made`: `now` is newer."""
        if before is None:
            self.added.append(given.name)
        elif now and not made:
            self.kept.append(given.name)
        elif (before.num_bytes, before.modified_ns) == (given.num_bytes, given.modified_ns):
            self.mended.append(given.name)
        else:
            (self.kept if now and now.sha256 == before.sha256 else self.changed).append(given.name)

    def __bool__(self) -> bool:
        return any(vars(self).values())

    def __str__(self) -> str:
        parts = [f"{len(self.kept)} kept"] if self.kept else []
        for what in ("added", "changed", "mended", "removed"):
            if names := getattr(self, what):
                more = len(names) - SHOWN_NAMES
                parts.append(f"{len(names)} {what} ({', '.join(names[:SHOWN_NAMES])}"
                             + (f" and {more} more)" if more > 0 else ")"))
        return f"sources: {', '.join(parts)}"


class Update:
    """One update of a dataset from its sources, inside `folder.held()`.

    `tokenizer` and `settings` are those of the manifest. A source of which only the modification time has changed is
    compared by contents if it is in `compared`; otherwise it counts as changed. Raises ConfigError if the dataset was
    made with other settings or shares no source with `inputs`, unless `overwrite`.
    """

    def __init__(self, folder: DatasetFolder, inputs: Sequence[Input], compared: Iterable[Input],
                 tokenizer: Mapping[str, Any], settings: Mapping[str, Any], skip_bad_rows: bool, overwrite: bool,
                 lint: str) -> None:
        self.folder = folder
        self.inputs = inputs
        self.tokenizer = tokenizer
        self.settings = settings
        self.skip_bad_rows = skip_bad_rows
        self.lint = lint
        self.overwrite = overwrite
        self.known = self._read_known()
        self.done: dict[str, Source] = {}
        self.changes = Changes()
        self._compared = {given.name for given in compared}
        before = {source.name: source for source in self.known.sources} if self.known else {}
        for given in inputs:
            known, recorded = before.get(given.name), folder.recorded(given.name, settings, overwrite)
            if kept := self._unchanged(given, recorded or known):
                self.done[given.name] = kept
            self.changes.add(given, known, kept, made=recorded is not None)
        self.changes.removed += sorted(before.keys() - {given.name for given in inputs})
        older = sum(source.reading < READING for source in self.done.values())
        if older and not settings.get("sentence_model"):  # the reading of documents has not changed
            log.warning("%s: %d of %d sources were read by an older version and stay so. It left out system and other "
                        "parts of prompts, learned masked turns and split the turns of a chat; if there are such, make "
                        "all of it again with --overwrite", folder.prefix, older, len(inputs))

    def make(self, inputs: Iterable[Input], encode: Encode, advance: Callable[[int, int], object]) -> None:
        """Make the shards of those `inputs` that have none; `advance` is called with bytes read and tokens made."""
        todo = {given.path: given for given in inputs if given.name not in self.done}
        if not todo:
            return
        with _digests(todo.values()) as digests, contextlib.closing(encode([*todo])) as encoded:
            for path, chunks in groupby(encoded, key=lambda pair: pair[0].path):
                self._finish(todo.pop(path), chunks, digests, advance)
            for given in todo.values():  # files without any row
                self._finish(given, iter(()), digests, advance)

    def missing(self) -> list[Input]:
        """Return the sources that are not finished."""
        return [given for given in self.inputs if given.name not in self.done]

    def complete(self, beside: Callable[[], object]) -> Manifest:
        """Call `beside`, write the manifest over all sources, and remove files that it does not list."""
        manifest = Manifest(self.tokenizer, self.settings, tuple(self.done[given.name] for given in self.inputs))
        if self.lint == "error":
            manifest.lint.refuse()
        if not manifest.shards:
            if not self.folder.dataset():
                self.folder.prune(set())
            left = "".join(f"; {line}" for line in manifest.left_out())
            raise ConfigError(f"{self.folder.prefix}: no example to write{left}; check the input")
        with signals_held(), self.folder.writing():
            beside()
            if manifest != self.known:
                write_manifest(self.folder.prefix, manifest, self.folder.scratch)
            self.folder.prune({shard.name for shard in manifest.shards})
        return manifest

    def _read_known(self) -> Manifest | None:
        """Return the existing manifest; None if there is none or it is to be overwritten."""
        prefix = self.folder.prefix
        if self.overwrite:
            return None
        known = read_manifest(prefix) if manifest_path(prefix).exists() else None
        if known is None:
            if old := self.folder.dataset():
                raise ConfigError(f"{', '.join(map(str, old))} already there, without shards; pass --overwrite to "
                                  "replace it, or choose another --output-prefix")
            return None
        check_settings(prefix, known.settings, self.settings)
        if not {source.name for source in known.sources} & {given.name for given in self.inputs}:
            raise ConfigError(f"{prefix} was made from {known.sources[0].name}"
                              + (f" and {len(known.sources) - 1} more" if len(known.sources) > 1 else "")
                              + ", nothing of which is among --input; name all sources to add some, choose another "
                              "--output-prefix, or replace it with --overwrite")
        return known

    def _unchanged(self, given: Input, source: Source | None) -> Source | None:
        """Return the known entry of a source if the source need not be read again."""
        if (source is None or source.num_bytes != given.num_bytes
                or (source.bad_rows and not self.skip_bad_rows) or (source.lint is None and self.lint != "off")
                or (source.shard and not source.shard.is_whole(self.folder.shards))):
            return None
        if source.modified_ns == given.modified_ns:
            return source
        if given.name not in self._compared or sha256_of(given.path) != source.sha256:
            return None
        touched = replace(source, modified_ns=given.modified_ns)
        if self.folder.task:  # so that the last task need not compare it again
            with self.folder.writing():
                self.folder.record(touched, self.settings, self.overwrite)
        return touched

    def _finish(self, given: Input, chunks: Iterable[tuple[Piece, Encoded]], digests: Mapping[str, Future[str]],
                advance: Callable[[int, int], object]) -> None:
        """Write the shard of a source and record that it is finished."""
        skipped = BadRows(self.skip_bad_rows)
        counts: Counter[str] = Counter()
        noted: Counter[str] = Counter()
        lint = Lint()
        with contextlib.ExitStack() as stack:
            with self.folder.writing():
                writer = ShardWriter(self.folder.scratch, self.tokenizer["vocab_size"])
            stack.callback(_close, writer)
            for piece, encoded in chunks:
                for bad_row in encoded.bad_rows:
                    skipped.take(bad_row)
                counts.update(truncated=encoded.truncated, defaulted=encoded.defaulted)
                noted += encoded.noted
                lint.merge(encoded.lint)
                if self.lint == "error":
                    lint.refuse(whole=False)
                with self.folder.writing():
                    writer.add(encoded.ids, encoded.lengths, encoded.prompt_keys, encoded.example_keys)
                advance(piece.num_bytes, len(encoded.ids))
            sha256 = digests[given.name].result()
            if Input.of(given.name, given.path) != given:
                raise ConfigError(f"{given.path} was changed while it was read; run the command again")
            with signals_held(), self.folder.writing():
                shard = writer.finish(self.folder.shards)
                source = Source(given.name, given.num_bytes, given.modified_ns, sha256, shard, counts["truncated"],
                                counts["defaulted"], dict(sorted(noted.items())),
                                {kind: Left(count, skipped.first[kind])
                                 for kind, count in sorted(skipped.count.items())},
                                None if self.lint == "off" else lint.to_json(), READING)
                self.folder.record(source, self.settings, self.overwrite)
        self.done[given.name] = source


def _close(writer: ShardWriter) -> None:
    with contextlib.suppress(OSError):  # closing flushes, so a full disk raises again
        writer.close()


@contextlib.contextmanager
def _digests(inputs: Iterable[Input]) -> Iterator[dict[str, Future[str]]]:
    """Hash the sources in a background thread, while they are read for encoding; yield name -> future."""
    stop = Event()
    with ThreadPoolExecutor(1) as pool:
        try:
            yield {given.name: pool.submit(sha256_of, given.path, stop) for given in inputs}
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def sha256_of(path: Path, stop: Event | None = None) -> str:
    """Hash a file; return early once `stop` is set."""
    hashed = hashlib.sha256()
    with open(path, "rb") as file:
        while (block := file.read(READ_BYTES)) and not (stop and stop.is_set()):
            hashed.update(block)
    return hashed.hexdigest()
