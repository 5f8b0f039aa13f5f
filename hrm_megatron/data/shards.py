"""One shard: the examples of one source file in Megatron's .bin/.idx format, and the keys of their texts.

A shard is named by the hash of its contents: equal rows give equal files, whatever they were made from, and a file
never changes once it has its name.
"""
from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from io import BufferedWriter, FileIO
from pathlib import Path
from typing import Any

import numpy as np

from hrm_megatron.config import ConfigError

HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document boundaries
MAGIC = b"MMIDIDX\x00\x00"
# Megatron's codes of the dtypes that we write
INDEX_DTYPES: dict[int, np.dtype[Any]] = {4: np.dtype(np.int32), 8: np.dtype(np.uint16)}
UINT16_ENTRIES = 1 << 16  # Megatron itself switches to int32 above 65,500 entries, which would double the .bin
PROMPT_KEYS, EXAMPLE_KEYS = "prompt_keys", "example_keys"
PARTS = ("bin", "idx", PROMPT_KEYS, EXAMPLE_KEYS)
KEY = np.dtype("<u8")  # one per prompt, two per example; files have no header
BLOCK_BYTES = 1 << 28  # each with its own digest, so that readers can share a large file
NAME_DIGITS = 32
COPIED_SEQUENCES = 1 << 20  # of an index, in memory at once


@dataclass(frozen=True)
class FileRecord:
    """Size of a file, and the SHA-256 of each block of `BLOCK_BYTES`."""

    num_bytes: int
    sha256: tuple[str, ...]


@dataclass(frozen=True)
class Block:
    """A byte range of a file and its SHA-256."""

    path: Path
    start: int
    length: int
    sha256: str

    def verify(self) -> None:
        """Raise ConfigError unless the file still holds these bytes."""
        hashed, left = hashlib.sha256(), self.length
        try:
            with open(self.path, "rb") as file:
                file.seek(self.start)
                while left and (piece := file.read(min(left, 1 << 20))):
                    hashed.update(piece)
                    left -= len(piece)
        except OSError as error:
            raise damaged(self.path, f"cannot read ({error.strerror})") from error
        if hashed.hexdigest() != self.sha256:
            raise damaged(self.path, f"bytes {self.start} to {self.start + self.length} are not what was written "
                                     "(SHA-256 differs)")


@dataclass(frozen=True)
class Shard:
    """What is known of a shard without opening it; `files` by part."""

    name: str
    examples: int
    tokens: int
    prefix_tokens: int
    max_row_length: int
    files: Mapping[str, FileRecord]

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Shard:
        """Read the result of `asdict`; raises KeyError or TypeError if it is something else."""
        files = {part: FileRecord(record["num_bytes"], tuple(record["sha256"]))
                 for part, record in value["files"].items()}
        return cls(**{**value, "files": files})

    def path(self, folder: Path, part: str) -> Path:
        return folder / f"{self.name}.{part}"

    def check_sizes(self, folder: Path) -> None:
        """Raise ConfigError unless all files exist with the recorded sizes."""
        for part, record in self.files.items():
            path = self.path(folder, part)
            try:
                size = path.stat().st_size
            except OSError as error:
                raise damaged(path, "not there" if isinstance(error, FileNotFoundError) else str(error.strerror)
                              ) from error
            if size != record.num_bytes:
                raise damaged(path, f"truncated: {size} bytes, {record.num_bytes} were written"
                              if size < record.num_bytes else f"{size} bytes, {record.num_bytes} were written")

    def is_whole(self, folder: Path) -> bool:
        """Return whether all files exist with the recorded sizes."""
        try:
            self.check_sizes(folder)
        except ConfigError:
            return False
        return True

    def blocks(self, folder: Path) -> Iterator[Block]:
        """Yield all blocks of the shard with their digests."""
        for part, record in self.files.items():
            for number, sha256 in enumerate(record.sha256):
                start = number * BLOCK_BYTES
                yield Block(self.path(folder, part), start, min(BLOCK_BYTES, record.num_bytes - start), sha256)


class ShardWriter:
    """Write the examples of one source into `scratch`; `finish` names the files by their contents.

    Memory does not grow with the number of examples. Raises OSError if the disk is full.
    """

    def __init__(self, scratch: Path, vocab_size: int) -> None:
        self.scratch = scratch
        self.dtype = np.dtype(np.uint16 if vocab_size <= UINT16_ENTRIES else np.int32)
        self.examples = self.tokens = self.prefix_tokens = self.max_row_length = 0
        self._files = {part: _HashedFile(scratch / part) for part in ("bin", PROMPT_KEYS, EXAMPLE_KEYS)}
        self._lengths = _create(scratch / "lengths")

    def add(self, ids: np.ndarray, lengths: np.ndarray, prompt_keys: np.ndarray, example_keys: np.ndarray) -> None:
        """Append examples: `ids` are prefix, target, prefix, target, ..., with `lengths` [n, 2], none of them zero;
        `prompt_keys` [n] and `example_keys` [n, 2] are the keys of their texts."""
        if not len(lengths):
            return
        assert lengths.min() > 0 and lengths.sum() == len(ids), (lengths.min(), lengths.sum(), len(ids))
        assert prompt_keys.shape == (len(lengths),) and example_keys.shape == (len(lengths), 2)
        self._files["bin"].write(ids.astype(self.dtype))
        self._files[PROMPT_KEYS].write(prompt_keys.astype(KEY))
        self._files[EXAMPLE_KEYS].write(example_keys.astype(KEY))
        self._lengths.write(lengths.astype("<i4").tobytes())
        self.examples += len(lengths)
        self.tokens += len(ids)
        self.prefix_tokens += int(lengths[:, 0].sum())
        self.max_row_length = max(self.max_row_length, int(lengths.sum(1).max()) - 1)

    def finish(self, folder: Path) -> Shard | None:
        """Move the files into `folder` under the shard's name; return None if there was no example."""
        self._lengths.close()
        if not self.examples:
            self.close()
            return None
        self._files["idx"] = _HashedFile(self.scratch / "idx")
        for block in self._index():
            self._files["idx"].write(block)
        records = {part: self._files[part].finish() for part in PARTS}
        contents = json.dumps({part: [record.num_bytes, record.sha256] for part, record in records.items()})
        shard = Shard(hashlib.sha256(contents.encode()).hexdigest()[:NAME_DIGITS], self.examples, self.tokens,
                      self.prefix_tokens, self.max_row_length, records)
        for part in PARTS:
            os.replace(self.scratch / part, shard.path(folder, part))
        return shard

    def close(self) -> None:
        """Close the files. This flushes buffers, so a full disk raises again."""
        self._lengths.close()
        for file in self._files.values():
            file.close()

    def _index(self) -> Iterator[np.ndarray]:
        """Yield Megatron's index: header, lengths, start of each sequence, and start of each document."""
        code = next(code for code, dtype in INDEX_DTYPES.items() if dtype == self.dtype)
        header = HEADER.pack(MAGIC, 1, code, 2 * self.examples, self.examples + 1)
        yield np.frombuffer(header, np.uint8)
        lengths = np.memmap(self.scratch / "lengths", "<i4", mode="r")
        blocks = [lengths[start:start + COPIED_SEQUENCES] for start in range(0, len(lengths), COPIED_SEQUENCES)]
        yield from blocks
        begin = 0
        for block in blocks:
            ends = begin + self.dtype.itemsize * block.cumsum(dtype=np.int64)
            yield np.concatenate([[begin], ends[:-1]]).astype("<i8")
            begin = int(ends[-1])
        for start in range(0, self.examples + 1, COPIED_SEQUENCES):
            yield 2 * np.arange(start, min(start + COPIED_SEQUENCES, self.examples + 1), dtype="<i8")


def _create(path: Path) -> BufferedWriter:
    return BufferedWriter(FileIO(path, "w"))


class _HashedFile:
    """A file that has the digests of its blocks once it is finished."""

    def __init__(self, path: Path) -> None:
        self._file = _create(path)
        self._size = 0
        self._done: list[str] = []
        self._hash = hashlib.sha256()

    def write(self, values: np.ndarray) -> None:
        data = memoryview(np.ascontiguousarray(values)).cast("B")
        self._file.write(data)
        while len(data):
            taken = data[:BLOCK_BYTES - self._size % BLOCK_BYTES]
            self._hash.update(taken)
            self._size += len(taken)
            data = data[len(taken):]
            if self._size % BLOCK_BYTES == 0:
                self._done.append(self._hash.hexdigest())
                self._hash = hashlib.sha256()

    def finish(self) -> FileRecord:
        """Flush and fsync the file, so that nothing that names it can outlive it."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        rest = [self._hash.hexdigest()] if self._size % BLOCK_BYTES else []
        return FileRecord(self._size, (*self._done, *rest))

    def close(self) -> None:
        self._file.close()


def damaged(path: Path, reason: str) -> ConfigError:
    return ConfigError(f"{path}: {reason}; delete it and run python tools/preprocess_data.py again, or copy it again")
