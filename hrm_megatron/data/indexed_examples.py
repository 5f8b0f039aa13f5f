"""Memory-mapped examples on disk: shards in Megatron's .bin/.idx format, one document of two sequences each."""
from __future__ import annotations

import contextlib
import hashlib
import os
import resource
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from hrm_megatron.config import ConfigError
from hrm_megatron.data.dataset_folder import DatasetFolder
from hrm_megatron.data.manifest import (
    PREPROCESS,
    TOKENIZER,
    TOTALS,
    Manifest,
    Source,
    broken,
    facts_of,
    manifest_path,
    read_json,
    read_manifest,
    shard_folder,
    write_manifest,
)
from hrm_megatron.data.open_shard import Ids, OpenShard, ShardFiles, read_header
from hrm_megatron.data.shards import EXAMPLE_KEYS, KEY, PARTS, PROMPT_KEYS, Block, ShardWriter
from hrm_megatron.data.tokenizer import TextTokenizer
from hrm_megatron.data.vocabulary import SCANNED_BYTES, BadTokenId, positions_outside

# Shards mapped at once, over all datasets of a blend, which may have more files than a process may open: half the
# file limit, at three files per shard.
FILES, MOST_FILES = resource.getrlimit(resource.RLIMIT_NOFILE)[0], 1 << 14
OPEN_SHARDS = max(16, (MOST_FILES if FILES == resource.RLIM_INFINITY else min(FILES, MOST_FILES)) // 6)


@dataclass(frozen=True)
class SourceRange:
    """Examples `first` to `first + count - 1` come from the source of this name."""

    name: str
    first: int
    count: int


class IndexedExamples:
    """Read the examples of all shards of a dataset as one sequence; `examples[i]` is (prefix ids, target ids).

    The sizes of all files are checked on opening; small datasets are scanned completely. `manifest` is None for a
    dataset of the older form, a single shard PREFIX.bin and PREFIX.idx, which has no checksums and no keys.
    """

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        path = manifest_path(prefix)
        folder = shard_folder(prefix)
        if not path.is_file() and Path(prefix).suffix == path.suffix and Path(prefix).is_file():
            raise ConfigError(f"{prefix}: a dataset is named by its prefix; give {Path(prefix).with_suffix('')}")
        if not path.is_file():
            raise ConfigError(f"{path} missing; " + (
                f"{folder} is not finished: run {PREPROCESS} again, or its --shard tasks with --merge at the end"
                if folder.is_dir() else f"write the dataset with {PREPROCESS} --output-prefix {prefix}"))
        self.manifest = read_manifest(prefix)
        if self.manifest:
            self.metadata: Mapping[str, Any] = {**self.manifest.tokenizer, **self.manifest.totals}
            self._shards = self._listed(self.manifest, folder)
            names = [source.name for source in self.manifest.sources if source.shard]
        else:
            self.metadata = self._read_single(path)
            self._shards = [ShardFiles(self.metadata["examples"], Path(f"{prefix}.bin"), Path(f"{prefix}.idx"))]
            names = [Path(prefix).name]
        self._first = [0, *accumulate(shard.examples for shard in self._shards)]
        self.sources = tuple(SourceRange(name, first, shard.examples)
                             for name, first, shard in zip(names, self._first[:-1], self._shards, strict=True))
        if not self.manifest or sum(shard.bin.stat().st_size for shard in self._shards) <= SCANNED_BYTES:
            self._look_through()

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, i: int) -> tuple[Ids, Ids]:
        i = int(i)
        if not 0 <= i < len(self):
            raise IndexError(f"example {i} of {len(self)}")
        shard = int(np.searchsorted(self._first, i, side="right")) - 1
        return _opened(self, self._shards[shard]).example(i - self._first[shard])

    @property
    def files(self) -> list[Path]:
        """The files that identify this dataset: the manifest, which has the checksums of all others."""
        return [manifest_path(self.prefix), *([] if self.manifest else [Path(f"{self.prefix}.{part}")
                                                                        for part in ("bin", "idx")])]

    @property
    def vocab_size(self) -> int:
        """Number of entries of the tokenizer that wrote the ids."""
        return int(self.metadata["vocab_size"])

    def example_name(self, i: int) -> str:
        return f"{self.prefix}, example {i}"

    def lengths(self, start: int = 0, stop: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return prefix and target lengths of examples `start` to `stop` - 1, int32 [n] each; of one shard a map."""
        both = self._joined(lambda shard: OpenShard(shard).lengths, start, stop)
        return both[:, 0], both[:, 1]

    def _joined(self, read: Callable[[ShardFiles], np.ndarray], start: int, stop: int | None) -> np.ndarray:
        """Concatenate what `read` maps of each shard for examples `start` to `stop` - 1; for one shard return the map
        itself.

        Of several shards each is unmapped before the next: a map keeps a file open, and a process may have only a few.
        """
        stop = len(self) if stop is None else stop
        between = self._between(start, stop)
        (shard, rows), rest = between[0], between[1:]
        first = read(shard)[rows]
        if not rest:
            return first
        found = np.empty((stop - start, *first.shape[1:]), first.dtype)
        found[:len(first)] = first
        at = len(first)
        del first
        for shard, rows in rest:
            part = read(shard)[rows]
            found[at:at + len(part)] = part
            at += len(part)
        return found

    def _between(self, start: int, stop: int) -> list[tuple[ShardFiles, slice]]:
        """Return the shards, and their slices, that hold examples `start` to `stop` - 1."""
        first = int(np.searchsorted(self._first, start, side="right")) - 1
        return [(shard, slice(max(0, start - begin), stop - begin))
                for shard, begin in zip(self._shards[first:], self._first[first:], strict=False) if begin < stop]

    def prompt_keys(self) -> np.ndarray | None:
        """Return the prompt keys [n]; None for a dataset of the older form. Memory-mapped if there is one shard."""
        return self._keys(PROMPT_KEYS)

    def example_keys(self, start: int = 0, stop: int | None = None) -> np.ndarray | None:
        """Return the keys [n, 2] of examples `start` to `stop` - 1; None for a dataset of the older form."""
        return self._keys(EXAMPLE_KEYS, start, stop)

    def check_tokenizer(self, fingerprint: str) -> None:
        """Refuse a tokenizer other than the one that wrote the ids."""
        ours = self.metadata["tokenizer_fingerprint"]
        if fingerprint != ours:
            raise ConfigError(f"{self.prefix} was written with tokenizer {ours[:12]}, not with {fingerprint[:12]}; "
                              f"give that tokenizer or run {PREPROCESS} again")

    def blocks(self) -> list[Block]:
        """Return all blocks of the shards with their checksums; ConfigError for a dataset of the older form."""
        if not self.manifest:
            raise ConfigError(f"{self.prefix} has no checksums: an older version has written it; run {PREPROCESS} "
                              "again to have some")
        folder = shard_folder(self.prefix)
        shards = {shard.name: shard for shard in self.manifest.shards}
        return [*chain.from_iterable(shard.blocks(folder) for shard in shards.values())]

    def _keys(self, part: str, start: int = 0, stop: int | None = None) -> np.ndarray | None:
        if not self.manifest:
            return None
        return self._joined(lambda shard: shard.keys(part), start, stop)

    def _listed(self, manifest: Manifest, folder: Path) -> list[ShardFiles]:
        for shard in {shard.name: shard for shard in manifest.shards}.values():
            shard.check_sizes(folder)
        return [ShardFiles(shard.examples, *(shard.path(folder, part) for part in PARTS)) for shard in manifest.shards]

    def _read_single(self, path: Path) -> dict[str, Any]:
        """Read the metadata of the older form."""
        metadata = read_json(path)
        if missing := [name for name in (*TOKENIZER, *TOTALS) if name not in metadata]:
            raise broken(path, f"has no {', '.join(missing)}")
        absent = [file for part in ("bin", "idx") if not os.path.isfile(file := f"{self.prefix}.{part}")]
        if absent:
            raise ConfigError(f"{', '.join(absent)} missing; write the dataset with {PREPROCESS} --output-prefix "
                              f"{self.prefix}")
        _, sequences = read_header(Path(f"{self.prefix}.idx"))
        if sequences // 2 != metadata["examples"]:
            raise broken(path, f"speaks of {metadata['examples']} examples, the index of {sequences // 2}")
        return metadata

    def _look_through(self) -> None:
        """Check every index and, in shards that are small enough, every id."""
        first = 0
        for shard in self._shards:
            opened = OpenShard(shard)
            opened.check_index()
            if opened.ids.nbytes <= SCANNED_BYTES:
                self._check_ids(opened, first)
            first += shard.examples

    def _check_ids(self, shard: OpenShard, first: int) -> None:
        """Refuse a token id outside the vocabulary; `first` is the number of the shard's first example."""
        for positions in positions_outside(shard.ids, self.vocab_size):
            at, ends = int(positions[0]), shard.lengths.reshape(-1).cumsum(dtype=np.int64)
            sequence = int(np.searchsorted(ends, at, side="right"))
            start = int(shard.starts[sequence]) // shard.ids.itemsize
            raise BadTokenId.at(self.example_name(first + sequence // 2), sequence % 2, at - start,
                                int(shard.ids[at]), self.vocab_size)


@lru_cache(OPEN_SHARDS)
def _opened(dataset: IndexedExamples, shard: ShardFiles) -> OpenShard:
    """Map a shard, cached per dataset object: reopening a dataset maps its files anew."""
    return OpenShard(shard)


class IndexedExamplesWriter:
    """Write a dataset of one source from ids, for examples that were tokenized elsewhere; their keys are hashes of the
    ids.

    Leaving the `with` block without an error makes the dataset readable; after an error nothing is left.
    """

    def __init__(self, prefix: str | Path, tokenizer: TextTokenizer) -> None:
        self.prefix = str(prefix)
        self.tokenizer = tokenizer
        self._folder = DatasetFolder(prefix)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> IndexedExamplesWriter:
        if manifest_path(self.prefix).exists():
            raise ConfigError(f"{manifest_path(self.prefix)} already there; choose another prefix")
        with contextlib.ExitStack() as stack:
            stack.enter_context(self._folder.held())
            with self._folder.writing():
                self._writer = ShardWriter(self._folder.scratch, self.tokenizer.vocab_size)
            self._stack = stack.pop_all()
        return self

    def add(self, prefix: Ids, target: Ids) -> None:
        """Append one example; both parts have at least one token."""
        ids = np.concatenate([prefix, target])
        keys = [hashlib.blake2b(np.asarray(part, "<i4").tobytes(), digest_size=8 * count).digest()
                for part, count in ((prefix, 1), (ids, 2))]
        with self._folder.writing():
            self._writer.add(ids, np.array([[len(prefix), len(target)]]), np.frombuffer(keys[0], KEY),
                             np.frombuffer(keys[1], KEY).reshape(1, 2))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        with self._stack, self._folder.writing():
            if kind is not None:
                self._writer.close()
                return
            shard = self._writer.finish(self._folder.shards)
            if shard is None:
                raise ConfigError(f"{self.prefix}: no example to write")
            source = Source(Path(self.prefix).name, 0, 0, "", shard)
            write_manifest(self.prefix, Manifest(facts_of(self.tokenizer), {"source": "token ids"}, (source,)),
                           self._folder.scratch)
