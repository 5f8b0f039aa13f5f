"""Read the `sampled` folder of HRM-Text's data pipeline: a token array, and places of examples by epoch."""
from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path

import numpy as np

from hrm_megatron.config import ConfigError
from hrm_megatron.data.npy_file import UnreadableArray, load_array
from hrm_megatron.data.vocabulary import SCANNED_BYTES, BadTokenId, positions_outside
from hrm_megatron.data.walk import Window, check_lengths, row_lengths, smallest_dtype

ARRAYS = ("inst_start", "inst_len", "resp_start", "resp_len")  # in every epoch, [examples] each

Ids = np.ndarray  # [n] token ids


class SampledEpoch:
    """One epoch in the folder's order, loaded for planning."""

    def __init__(self, lengths: np.ndarray, id_dtype: np.dtype[np.unsignedinteger]) -> None:
        self.lengths, self.id_dtype = lengths, id_dtype

    def __len__(self) -> int:
        return len(self.lengths)

    def window(self, start: int, stop: int) -> Window:
        return Window(np.arange(start, stop, dtype=self.id_dtype), self.lengths[start:stop])


class SampledFolder:
    """A `Walk` over the examples of `epochs` stored epochs, in the order of the folder; later epochs repeat them.

    `context_size` is the length of the longest example in positions. Everything is memory-mapped and checked on
    opening, token ids only if the array is small.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._read_metadata(self.path / "metadata.json")
        self._tokens = self._load(self.tokens_file)
        self.epochs = 0
        while self._folder(self.epochs).is_dir():
            self.epochs += 1
        # A gap in the numbers would leave all later epochs unread.
        if not self.epochs or sum(folder.is_dir() for folder in self.path.glob("epoch_[0-9]*")) > self.epochs:
            raise ConfigError(f"{self._folder(self.epochs)} missing; give a folder that sample_tokenized.py wrote")
        self._arrays = [self._read_epoch(epoch) for epoch in range(self.epochs)]
        self.id_dtype = smallest_dtype(self.size)
        if self._tokens.nbytes <= SCANNED_BYTES:
            self._check_ids()

    def __reduce__(self) -> tuple[type[SampledFolder], tuple[Path]]:
        return SampledFolder, (self.path,)  # a loader worker maps the files itself instead of receiving a copy

    @property
    def folder(self) -> Path:
        return self.path.with_name(f"{self.path.name}.rows")

    @property
    def size(self) -> int:
        return max(len(arrays["inst_len"]) for arrays in self._arrays)

    def identity(self, epoch: int) -> str:
        prefixes, targets = self.epoch_lengths(epoch)
        return hashlib.sha256(row_lengths(prefixes, targets)).hexdigest()

    def check(self, row_tokens: int) -> None:
        for epoch in range(self.epochs):
            check_lengths(row_lengths(*self.epoch_lengths(epoch)), row_tokens, partial(self.example_name, epoch))

    def epoch(self, epoch: int) -> SampledEpoch:
        return SampledEpoch(row_lengths(*self.epoch_lengths(epoch)), self.id_dtype)

    def epoch_lengths(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the prefix and target lengths of the examples of an epoch, [n] each."""
        arrays = self._arrays[epoch % self.epochs]
        return arrays["inst_len"], arrays["resp_len"]

    def example(self, epoch: int, i: int) -> tuple[Ids, Ids]:
        """Return (prefix ids, target ids) of example i of an epoch."""
        inst_start, inst_len, resp_start, resp_len = (int(self._arrays[epoch % self.epochs][name][i])
                                                      for name in ARRAYS)
        return self._tokens[inst_start:inst_start + inst_len], self._tokens[resp_start:resp_start + resp_len]

    def example_name(self, epoch: int, i: int) -> str:
        return f"{self._folder(epoch % self.epochs)}, example {i}"

    @property
    def files(self) -> list[Path]:
        epochs = [file for epoch in range(self.epochs) for file in self.epoch_files(epoch)]
        return [self.path / "metadata.json", self.tokens_file, *epochs]

    @property
    def tokens_file(self) -> Path:
        return self.path / "tokens.npy"

    def epoch_files(self, epoch: int) -> list[Path]:
        return [self._folder(epoch) / f"{name}.npy" for name in ARRAYS]

    def fewest_positions(self) -> int:
        """Return the number of positions that the examples of the shortest epoch take."""
        return min(int(row_lengths(*self.epoch_lengths(epoch)).sum()) for epoch in range(self.epochs))

    def _folder(self, epoch: int) -> Path:
        return self.path / f"epoch_{epoch}"

    def _read_metadata(self, path: Path) -> None:
        try:
            metadata = json.loads(path.read_text(encoding="utf-8"))
            self.vocab_size = int(metadata["tokenizer_info"]["vocab_size"])
            self.context_size = int(metadata["max_seq_len"]) - 1  # the reference counts the shifted token too
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}; give a folder that sample_tokenized.py wrote") from error
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path}: no tokenizer_info.vocab_size and max_seq_len in it ({error!r}); write the "
                              "folder again with sample_tokenized.py") from error

    def _load(self, path: Path) -> np.ndarray:
        try:
            array = load_array(path)
        except UnreadableArray as error:
            raise ConfigError(f"{error}; write the folder again with sample_tokenized.py") from error
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise ConfigError(f"{path}: holds {array.dtype} of shape {array.shape}, not a list of integers; write the "
                              "folder again with sample_tokenized.py")
        return array

    def _read_epoch(self, epoch: int) -> dict[str, np.ndarray]:
        folder = self._folder(epoch)
        arrays = {name: self._load(folder / f"{name}.npy") for name in ARRAYS}
        counts = {name: len(array) for name, array in arrays.items()}
        if len(set(counts.values())) > 1:
            raise ConfigError(f"{folder}: arrays of different lengths {counts}; write the folder again")
        if not counts["inst_len"]:
            raise ConfigError(f"{folder}: no examples; write the folder again")
        for part in ("inst", "resp"):
            starts, lengths = arrays[f"{part}_start"], arrays[f"{part}_len"]
            self._refuse(folder / f"{part}_len.npy", lengths, lengths < 1, "is empty")
            self._refuse(folder / f"{part}_len.npy", lengths, lengths > self.context_size,
                         f"is longer than the {self.context_size} positions of metadata.json")
            outside = (starts < 0) | (starts > len(self._tokens) - lengths.astype(np.int64))
            self._refuse(folder / f"{part}_start.npy", starts, outside,
                         f"ends outside the {len(self._tokens)} tokens of {self.tokens_file}")
        row_lengths = arrays["inst_len"] + arrays["resp_len"] - 1
        self._refuse(folder, row_lengths, row_lengths > self.context_size,
                     f"takes more positions than the {self.context_size} of metadata.json")
        return arrays

    def _check_ids(self) -> None:
        """Refuse a token id outside the vocabulary in any example; tokens that no example uses are not checked."""
        for bad in positions_outside(self._tokens, self.vocab_size):
            for epoch, arrays in enumerate(self._arrays):
                for part, (start_name, length_name) in enumerate((ARRAYS[:2], ARRAYS[2:])):
                    starts, lengths = arrays[start_name], arrays[length_name]
                    next_bad = np.append(bad, len(self._tokens))[np.searchsorted(bad, starts)]
                    if (found := np.flatnonzero(next_bad < starts + lengths)).size:
                        i = int(found[0])
                        at = int(next_bad[i])
                        raise BadTokenId.at(self.example_name(epoch, i), part, at - int(starts[i]),
                                            int(self._tokens[at]), self.vocab_size)

    @staticmethod
    def _refuse(path: Path, values: np.ndarray, bad: np.ndarray, reason: str) -> None:
        if bad.any():
            row = int(bad.argmax())
            raise ConfigError(f"{path}: row {row} with value {values[row]} {reason}; write the folder again with "
                              "sample_tokenized.py")
