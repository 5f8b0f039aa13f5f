"""HRM-Text's sampler: from its tokenized folders and rules to the `sampled` folder that its trainer reads, bit for bit.

All draws come from one Philox generator. For each source, in the order of names, they are a permutation of its eligible
rows whenever the last one is used up; then follows one permutation of all rows of the epoch. In the next epoch each
source continues where it stopped.
"""
from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hrm_megatron.config import ConfigError
from hrm_megatron.data.npy_file import UnreadableArray, load_array
from hrm_megatron.data.sampled import ARRAYS
from hrm_megatron.data.sampling_rules import Rule, Rules
from hrm_megatron.program import signals_held

COPIED_TOKENS = 1 << 22  # at a time
# Largest vocabulary of each dtype; the reference compares the number of entries, so 65,536 of them take four bytes.
TOKEN_DTYPES = ((np.iinfo(np.uint8).max, np.uint8), (np.iinfo(np.uint16).max, np.uint16))

Ints = np.ndarray  # [n] integers


@dataclass
class TokenizedSource:
    """One folder of tokenized rows: those that may be drawn, and the state of its walk."""

    name: str
    rule: Rule
    tokens: np.ndarray  # memory-mapped
    eligible: dict[str, Ints]  # keys are ARRAYS, [rows] each
    order: Ints = field(default_factory=lambda: np.empty(0, np.int64))  # rest of the last permutation
    drawn: int = 0

    @property
    def rows(self) -> int:
        return len(self.eligible["inst_len"])

    @property
    def per_epoch(self) -> int:
        return self.rule.per_epoch(self.rows)

    def draw(self, random: np.random.Generator) -> Ints:
        """Return the next `per_epoch` rows of the walk."""
        taken: list[Ints] = []
        left = self.per_epoch
        self.drawn += left
        while left:
            if not len(self.order):
                self.order = random.permutation(self.rows)
            taken.append(self.order[:left])
            self.order = self.order[left:]
            left -= len(taken[-1])
        return np.concatenate([np.empty(0, np.int64), *taken])


def open_tokenized(folder: str | Path, rules: Rules, context_tokens: int
                   ) -> tuple[dict[str, Any], list[TokenizedSource]]:
    """Return the contents of tokenizer_info.json, and all sources in the order of their names."""
    folder = Path(folder)
    path = folder / "tokenizer_info.json"
    try:
        info = dict(json.loads(path.read_text(encoding="utf-8")))
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give a folder that HRM-Text's tokenizer wrote") from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: no JSON object ({error}); tokenize again") from error
    if not names:
        raise ConfigError(f"{folder}: no tokenized sources in it; tokenize again")
    return info, [_open_source(folder / name, rule, context_tokens)
                  for name, rule in zip(names, rules.assign(names), strict=True)]


def _open_source(folder: Path, rule: Rule, context_tokens: int) -> TokenizedSource:
    arrays: dict[str, np.ndarray] = {}
    for name in (*ARRAYS, "tokens"):
        path = folder / f"{name}.npy"
        try:
            arrays[name] = load_array(path)
        except UnreadableArray as error:
            raise ConfigError(f"{error}; tokenize again") from error
        if arrays[name].ndim != 1 or arrays[name].dtype.kind not in "iu":
            raise ConfigError(f"{path}: holds {arrays[name].dtype} of shape {arrays[name].shape}, not a list of "
                              "integers; tokenize again")
    tokens = arrays.pop("tokens")
    if len({len(array) for array in arrays.values()}) > 1:
        raise ConfigError(f"{folder}: arrays of different lengths "
                          f"{ {name: len(array) for name, array in arrays.items()} }; tokenize again")
    rows = {name: array.astype(np.int64) for name, array in arrays.items()}
    for part in ("inst", "resp"):
        starts, lengths = rows[f"{part}_start"], rows[f"{part}_len"]
        outside = (starts < 0) | (lengths < 0) | (starts > len(tokens) - lengths)
        if outside.any():
            row = int(outside.argmax())
            raise ConfigError(f"{folder / part}_start.npy: row {row} takes tokens {starts[row]} to "
                              f"{starts[row] + lengths[row]} of {len(tokens)}; tokenize again")
    keep = rule.eligible(rows["inst_len"], rows["resp_len"], context_tokens)
    rows["resp_len"] = np.minimum(rows["resp_len"], context_tokens - rows["inst_len"])
    return TokenizedSource(folder.name, rule, tokens, {name: array[keep] for name, array in rows.items()})


def sample(folder: str | Path, rules: Rules, seed: int, epochs: int, context_tokens: int, output: str | Path
           ) -> list[TokenizedSource]:
    """Write the sampled folder `output`, completely or not at all; return the sources with what was drawn from them."""
    output = Path(output)
    if output.exists():
        raise ConfigError(f"{output} is already there; remove it or choose another --sampled-output")
    for flag, value, least in (("--epochs", epochs, 1), ("--context-tokens", context_tokens, 2), ("--seed", seed, 0)):
        if value < least:
            raise ConfigError(f"{flag} {value}: give at least {least}")
    info, sources = open_tokenized(folder, rules, context_tokens)
    if not any(source.per_epoch for source in sources):
        raise ConfigError(f"{folder}: no row fits --context-tokens {context_tokens} with a response; raise it")
    partial = output.with_name(f"{output.name}.partial-{uuid.uuid4().hex}")
    try:
        partial.mkdir(parents=True)
        _write_tokens(partial / "tokens.npy", sources, info.get("vocab_size"))
        total = _write_epochs(partial, sources, seed, epochs)
        metadata = {"tokenizer_info": info, "vocab_size": None, "max_seq_len": context_tokens,
                    "total_length": round(total / epochs)}
        (partial / "metadata.json").write_text(json.dumps(metadata, ensure_ascii=False, separators=(",", ":")),
                                               encoding="utf-8")
        partial.rename(output)
    except OSError as error:
        raise ConfigError(f"{output}: cannot write ({error.strerror}); free some space or choose another "
                          "--sampled-output") from error
    finally:
        with signals_held():
            shutil.rmtree(partial, ignore_errors=True)
    return sources


def _write_tokens(path: Path, sources: Sequence[TokenizedSource], vocab_size: int | None) -> None:
    """Concatenate the tokens of all sources."""
    dtype = next((dtype for largest, dtype in TOKEN_DTYPES if vocab_size is not None and vocab_size <= largest),
                 np.int32)
    shape = (sum(len(source.tokens) for source in sources),)
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
                                                    "fortran_order": False, "shape": shape})
        for source in sources:
            for start in range(0, len(source.tokens), COPIED_TOKENS):
                source.tokens[start:start + COPIED_TOKENS].astype(dtype).tofile(file)


def _write_epochs(folder: Path, sources: Sequence[TokenizedSource], seed: int, epochs: int) -> int:
    """Draw and write every epoch; return the number of tokens of all epochs."""
    random = np.random.Generator(np.random.Philox(seed=seed))
    first = np.cumsum([0, *(len(source.tokens) for source in sources)])
    total = 0
    for epoch in range(epochs):
        drawn = [source.draw(random) for source in sources]
        order = random.permutation(sum(map(len, drawn)))
        place = folder / f"epoch_{epoch}"
        place.mkdir()
        for name in ARRAYS:
            pieces = [source.eligible[name][rows] + (start if name.endswith("start") else 0)
                      for source, rows, start in zip(sources, drawn, first, strict=False)]
            values = np.concatenate(pieces)
            total += int(values.sum()) if name.endswith("len") else 0
            np.save(place / f"{name}.npy", values[order], allow_pickle=False)
    return total
