"""A memory-mapped shard, and the checks that its files must pass."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hrm_megatron.data.shards import HEADER, INDEX_DTYPES, KEY, MAGIC, PROMPT_KEYS, damaged

CHECKED_SEQUENCES = 1 << 22  # of an index, checked at a time

Ids = np.ndarray  # [n] token ids


@dataclass(frozen=True)
class ShardFiles:
    """The number of examples in a shard, and the paths of its parts. A shard of the older form has no keys."""

    examples: int
    bin: Path
    idx: Path
    prompt_keys: Path | None = None
    example_keys: Path | None = None

    def keys(self, part: str) -> np.ndarray:
        """Map the keys of a part: [n] for prompts, [n, 2] for examples."""
        path = getattr(self, part)
        return mapped(path, KEY).reshape((self.examples,) if part == PROMPT_KEYS else (self.examples, 2))


class OpenShard:
    """A memory-mapped shard; `lengths` [n, 2] of prefix and target."""

    def __init__(self, files: ShardFiles) -> None:
        self.files = files
        dtype, sequences = read_header(files.idx)
        if sequences != 2 * files.examples:
            raise damaged(files.idx, f"{sequences} sequences, of which {files.examples} examples need "
                                     f"{2 * files.examples}")
        at = HEADER.size
        self.lengths = mapped(files.idx, "<i4", at, sequences).reshape(-1, 2)
        self.starts = mapped(files.idx, "<i8", at + 4 * sequences, sequences)
        self.ids = mapped(files.bin, dtype)

    def example(self, i: int) -> tuple[Ids, Ids]:
        """Return (prefix ids, target ids) as copies, so that no file stays open for them."""
        parts = []
        for sequence, length in zip((2 * i, 2 * i + 1), self.lengths[i].tolist(), strict=True):
            start, rest = divmod(int(self.starts[sequence]), self.ids.itemsize)
            if rest or start < 0 or length < 1 or start + length > len(self.ids):
                raise damaged(self.files.idx, f"example {i} lies outside {self.files.bin.name}")
            parts.append(np.array(self.ids[start:start + length]))
        return parts[0], parts[1]

    def check_index(self) -> None:
        """Raise ConfigError unless the index fits itself and the .bin: contiguous pairs of non-empty sequences."""
        flat, end = self.lengths.reshape(-1), 0
        for first in range(0, len(flat), CHECKED_SEQUENCES):
            lengths = flat[first:first + CHECKED_SEQUENCES]
            if lengths.min() < 1:
                raise damaged(self.files.idx, f"example {(first + int(lengths.argmin())) // 2} has an empty prefix or "
                                              "target")
            ends = end + lengths.cumsum(dtype=np.int64) * self.ids.itemsize
            if not np.array_equal(self.starts[first:first + CHECKED_SEQUENCES], np.append(end, ends[:-1])):
                raise damaged(self.files.idx, "its sequences do not follow each other")
            end = int(ends[-1])
        size = self.ids.nbytes
        if size != end:
            raise damaged(self.files.bin, f"truncated: {size} bytes, its index promises {end}" if size < end
                          else f"{size} bytes, its index promises {end}")
        at = HEADER.size + 12 * len(flat)
        documents = mapped(self.files.idx, "<i8", at)
        for first in range(0, len(documents), CHECKED_SEQUENCES):
            block = documents[first:first + CHECKED_SEQUENCES]
            if not np.array_equal(block, 2 * np.arange(first, first + len(block))):
                raise damaged(self.files.idx, "its documents are not pairs of prefix and target")


def mapped(path: Path, dtype: Any, offset: int = 0, count: int | None = None) -> np.ndarray:
    """Map a file as an array; ConfigError if it is missing or too short."""
    try:
        return np.memmap(path, dtype, mode="r", offset=offset, shape=None if count is None else (count,))
    except FileNotFoundError as error:
        raise damaged(path, "not there; was the dataset written again while it is read?") from error
    except ValueError as error:
        raise damaged(path, f"truncated ({error})") from error


def read_header(index: Path) -> tuple[np.dtype[Any], int]:
    """Return dtype of the ids and number of sequences; ConfigError if truncated or no index of pairs."""
    size = index.stat().st_size
    with open(index, "rb") as file:
        header = file.read(HEADER.size)
    if len(header) < HEADER.size:
        raise damaged(index, f"truncated: {size} bytes are less than a header")
    magic, version, code, sequences, boundaries = HEADER.unpack(header)
    if (magic, version) != (MAGIC, 1) or code not in INDEX_DTYPES:
        raise damaged(index, "not a Megatron index of uint16 or int32 tokens")
    promised = HEADER.size + sequences * (4 + 8) + boundaries * 8
    if size != promised:
        raise damaged(index, f"truncated: {size} bytes, its header promises {promised}")
    if sequences % 2 or boundaries != sequences // 2 + 1:
        raise damaged(index, "its documents are not pairs of prefix and target")
    return INDEX_DTYPES[code], sequences
