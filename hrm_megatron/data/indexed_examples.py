"""Examples on disk: Megatron's .bin/.idx, one document of two sequences (prefix, target) per example, and a .json."""
from __future__ import annotations

import contextlib
import json
import logging
import os
import struct
import uuid
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np

from hrm_megatron.config import ConfigError
from hrm_megatron.data.plan import row_length
from hrm_megatron.data.provenance import Provenance
from hrm_megatron.data.tokenizer import TextTokenizer
from hrm_megatron.data.vocabulary import SCANNED_BYTES, BadTokenId, positions_outside
from hrm_megatron.program import signals_held

PARTS = ("bin", "idx", "json")  # the order of their renames: a dataset without .json is not finished
UINT16_ENTRIES = 1 << 16  # Megatron itself falls back to int32 above 65,500 and would double the .bin
MADE_FROM = "made_from"  # in the metadata, where the writer knew it
METADATA = ("tokenizer_fingerprint", "vocab_size", "boq", "eoq", "eoa", "examples", "tokens", "max_row_length")
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document boundaries
MAGIC = b"MMIDIDX\x00\x00"
# Megatron's codes of what we write
INDEX_DTYPES: dict[int, np.dtype[Any]] = {4: np.dtype(np.int32), 8: np.dtype(np.uint16)}
PREPROCESS = "python tools/preprocess_data.py"

Ids = np.ndarray  # [n] token ids


def _indexed_dataset() -> ModuleType:
    """Import Megatron's reader and writer at first use: it takes seconds, and workers that only encode need none."""
    from hrm_megatron.parallel.cpu import activate
    # It talks of Apex and CUDA while it is imported; neither matters for files.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        activate()
        from megatron.core.datasets import indexed_dataset
    module: ModuleType = indexed_dataset
    return module


def dataset_files(prefix: str | Path) -> dict[str, Path]:
    """Paths of an indexed dataset by part; the prefix may hold dots."""
    return {part: Path(f"{prefix}.{part}") for part in PARTS}


def check_output_prefix(prefix: str | Path, overwrite: bool) -> None:
    """Refuse to replace a dataset unless told to."""
    existing = [str(path) for path in dataset_files(prefix).values() if path.exists()]
    if existing and not overwrite:
        raise ConfigError(f"{', '.join(existing)} already there; pass --overwrite or choose another --output-prefix")


def already_made(prefix: str | Path, provenance: Provenance) -> bool:
    """Say whether a whole dataset of this provenance is there; one of another, or without any, is a ConfigError."""
    files = dataset_files(prefix)
    if not all(path.exists() for path in files.values()):
        return False  # nothing, or what check_output_prefix refuses
    provenance.check(str(prefix), _read_metadata(files["json"]).get(MADE_FROM))
    return True


class IndexedExamplesWriter:
    """Write examples under temporary names; leaving the `with` block without an error gives them theirs.

    A full disk is a ConfigError. After any error nothing is left, and what was there before is untouched. With a
    `provenance` the dataset knows what it was made from.
    """

    def __init__(self, prefix: str | Path, tokenizer: TextTokenizer, overwrite: bool = False,
                 provenance: Provenance | None = None) -> None:
        check_output_prefix(prefix, overwrite)
        self.prefix = str(prefix)
        self.metadata: dict[str, Any] = {
            "tokenizer_fingerprint": tokenizer.fingerprint, "vocab_size": tokenizer.vocab_size,
            "boq": tokenizer.boq, "eoq": tokenizer.eoq, "eoa": tokenizer.eoa,
            "examples": 0, "tokens": 0, "max_row_length": 0}
        if provenance:
            self.metadata[MADE_FROM] = provenance.to_json()
        self._files = dataset_files(self.prefix)
        self._partial = {part: Path(f"{path}.partial-{uuid.uuid4().hex}") for part, path in self._files.items()}
        self._new_folders: list[Path] = []

    def __enter__(self) -> IndexedExamplesWriter:
        indexed_dataset = _indexed_dataset()
        dtype = np.uint16 if self.metadata["vocab_size"] <= UINT16_ENTRIES else np.int32
        try:
            with self._one_line():
                folder = self._files["bin"].parent
                self._new_folders = [path for path in (folder, *folder.parents) if not path.exists()]
                folder.mkdir(parents=True, exist_ok=True)
                self._builder = indexed_dataset.IndexedDatasetBuilder(str(self._partial["bin"]), dtype=dtype)
        except BaseException:
            self._discard()
            raise
        return self

    def add(self, prefix: Ids, target: Ids) -> None:
        """Append one example; both parts have at least one token."""
        assert len(prefix) and len(target), (len(prefix), len(target))
        with self._one_line():
            self._builder.add_document(np.concatenate([prefix, target]), [len(prefix), len(target)])
        self.metadata["examples"] += 1
        self.metadata["tokens"] += len(prefix) + len(target)
        self.metadata["max_row_length"] = max(self.metadata["max_row_length"], row_length(len(prefix), len(target)))

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            self._discard()

    def _commit(self) -> None:
        if not self.metadata["examples"]:
            raise ConfigError(f"{self.prefix}: no example to write; check the input")
        with self._one_line():
            self._builder.finalize(str(self._partial["idx"]))
            self._partial["json"].write_text(json.dumps(self.metadata, indent=1), encoding="utf-8")
            with signals_held():
                self._files["json"].unlink(missing_ok=True)  # an interrupted replacement must not look whole
                for part in PARTS:
                    os.replace(self._partial[part], self._files[part])
        self._new_folders = []

    @signals_held()
    def _discard(self) -> None:
        if hasattr(self, "_builder"):
            with contextlib.suppress(OSError):  # closing flushes: a full disk fails once more
                self._builder.data_file.close()
        for path in self._partial.values():
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            for folder in self._new_folders:
                folder.rmdir()

    @contextlib.contextmanager
    def _one_line(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(f"{self.prefix}: cannot write ({error.strerror}); free some space or choose another "
                              "--output-prefix") from error


@dataclass(frozen=True)
class SourceRange:
    """Examples `first` to `first + count - 1` come from the source of this name."""

    name: str
    first: int
    count: int


class IndexedExamples:
    """Read an indexed dataset of examples by memory map; `examples[i]` is (prefix ids, target ids)."""

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        files = dataset_files(self.prefix)
        if missing := [str(path) for path in files.values() if not path.is_file()]:
            raise ConfigError(f"{', '.join(missing)} missing; write the dataset with {PREPROCESS} --output-prefix "
                              f"{self.prefix}")
        self.metadata = _read_metadata(files["json"])
        self._check_files(files)
        self._dataset = _indexed_dataset().IndexedDataset(self.prefix)

    def __len__(self) -> int:
        return len(self._dataset) // 2

    @property
    def files(self) -> list[Path]:
        return [*dataset_files(self.prefix).values()]

    @property
    def vocab_size(self) -> int:
        """Entries of the tokenizer that wrote the ids."""
        return int(self.metadata["vocab_size"])

    def __getitem__(self, i: int) -> tuple[Ids, Ids]:
        # Copies: Megatron unmaps its files when the reader goes, and a view left behind would crash the process.
        return self._dataset[2 * int(i)].copy(), self._dataset[2 * int(i) + 1].copy()

    @property
    def sources(self) -> tuple[SourceRange, ...]:
        return (SourceRange(Path(self.prefix).name, 0, len(self)),)

    def prompt_keys(self) -> np.ndarray | None:
        """A key [n] of each instruction; None for a dataset that has none."""
        return None

    def example_keys(self) -> np.ndarray | None:
        """Two keys [n, 2] of all texts of each example; None for a dataset that has none."""
        return None

    def example_name(self, i: int) -> str:
        return f"{self.prefix}, example {i}"

    def lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Prefix and target lengths of all examples, [n] each."""
        both = self._dataset.sequence_lengths.astype(np.int64)
        return both[0::2], both[1::2]

    def check_tokenizer(self, fingerprint: str) -> None:
        """Refuse a tokenizer other than the one that wrote the ids."""
        ours = self.metadata["tokenizer_fingerprint"]
        if fingerprint != ours:
            raise ConfigError(f"{self.prefix} was written with tokenizer {ours[:12]}, not with {fingerprint[:12]}; "
                              f"give that tokenizer or run {PREPROCESS} again")

    def _check_files(self, files: dict[str, Path]) -> None:
        """Compare what the three files say of each other, before Megatron maps whatever a damaged index promises."""
        index, size = files["idx"], files["idx"].stat().st_size
        with open(index, "rb") as file:
            header = file.read(HEADER.size)
            if len(header) < HEADER.size:
                raise _broken(index, f"truncated: {size} bytes are less than a header")
            magic, version, code, sequences, boundaries = HEADER.unpack(header)
            if (magic, version) != (MAGIC, 1) or code not in INDEX_DTYPES:
                raise _broken(index, "not a Megatron index of uint16 or int32 tokens")
            promised = HEADER.size + sequences * (4 + 8) + boundaries * 8
            if size != promised:
                raise _broken(index, f"truncated: {size} bytes, its header promises {promised}")
            lengths = np.fromfile(file, np.int32, sequences)
            file.seek(sequences * 8, os.SEEK_CUR)  # where each sequence begins follows from the lengths
            ends = np.fromfile(file, np.int64, boundaries)
        if sequences % 2 or not np.array_equal(ends, np.arange(0, sequences + 1, 2)):
            raise _broken(index, "its documents are not pairs of prefix and target")
        if sequences and lengths.min() < 1:
            raise _broken(index, f"example {int(lengths.argmin()) // 2} has an empty prefix or target")
        size = files["bin"].stat().st_size
        promised = int(lengths.sum(dtype=np.int64)) * INDEX_DTYPES[code].itemsize
        if size != promised:
            raise _broken(files["bin"], f"truncated: {size} bytes, its index promises {promised}")
        if sequences // 2 != self.metadata["examples"]:
            raise _broken(files["json"], f"speaks of {self.metadata['examples']} examples, the index of "
                                         f"{sequences // 2}")
        self._check_ids(files["bin"], INDEX_DTYPES[code], lengths)

    def _check_ids(self, path: Path, dtype: np.dtype[Any], lengths: np.ndarray) -> None:
        """Refuse a token id outside the vocabulary, in a dataset small enough to be read for that."""
        if not self.metadata["examples"] or path.stat().st_size > SCANNED_BYTES:
            return
        tokens = np.memmap(path, dtype, mode="r")
        for positions in positions_outside(tokens, self.vocab_size):
            at, ends = int(positions[0]), lengths.cumsum(dtype=np.int64)
            sequence = int(np.searchsorted(ends, at, side="right"))
            raise BadTokenId.at(self.example_name(sequence // 2), sequence % 2,
                                at - int(ends[sequence] - lengths[sequence]), int(tokens[at]), self.vocab_size)


def _broken(path: Path, reason: str) -> ConfigError:
    return ConfigError(f"{path}: {reason}; run {PREPROCESS} again")


def _read_metadata(path: Path) -> dict[str, Any]:
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _broken(path, f"not JSON ({error})") from error
    if missing := [name for name in METADATA if not isinstance(metadata, dict) or name not in metadata]:
        raise _broken(path, f"has no {', '.join(missing)}")
    return dict(metadata)
