"""The interface between readers and writers of all formats: plain values, and a function that reads one tensor."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch

from hrm_megatron.config import Architecture, ConfigError
from hrm_megatron.convert.table import Rename, table

TokenIds = int | list[int]  # transformers accepts several eos ids
RAW, EMA = "raw", "ema"
PARTS = (RAW, "exp_avg", "exp_avg_sq", EMA)  # of every trained tensor, fp32
TOKENS_KNOWN = "tokens_known"  # name under which conversions record `Checkpoint.tokens_known`


@dataclass(frozen=True)
class Training:
    """Settings of the run, as far as the formats hold them; the defaults are HRM-Text's (cfg_pretrain, size XL)."""

    seq_length: int = 4096  # context of the model: the longest rows that it was trained with
    row_tokens: int | None = None  # row length of the latest training; None: seq_length
    tokens_per_step: int = 196_608
    total_steps: int = 1
    lr: float = 2.2e-4
    min_lr: float = 2.2e-4
    last_lr: float = 0.0  # at the latest step
    warmup_steps: int = 0
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    ema_decay: float = 0.9999
    bp_min_steps: int = 2
    bp_max_steps: int = 5
    bp_warmup_fraction: float = 0.2
    seed: int = 1234
    loss_on_prefix: bool = False
    adamw: bool = False

    def __post_init__(self) -> None:
        if self.seq_length < 1:
            raise ConfigError(f"seq_length={self.seq_length}: must be at least 1")


class Origin(NamedTuple):
    """Kind and iteration of the weights in a weights-only folder; None and 0 if it does not record them."""

    kind: str | None
    iteration: int


@dataclass(frozen=True)
class Checkpoint:
    """A model and its optimizer state, read from a folder of any format.

    `iteration` counts optimizer steps, `embedding_updates` those that updated the embedding. `parts` lists what is
    stored of the trained tensors (PARTS); `read(part, entry)` reads one, unsharded, in Megatron's layout. `token_ids`
    are the special token ids of transformers' configs, if the format has them.
    """

    path: Path
    architecture: Architecture
    training: Training
    iteration: int
    embedding_updates: int
    parts: frozenset[str]
    read: Callable[[str, Rename], torch.Tensor]
    token_ids: Mapping[str, TokenIds] = field(default_factory=dict)
    remark: str = ""  # what could not be verified, as the end of a sentence
    vocabulary: str | None = None  # hash of its tokens (data/tokenizer.py), if training knew them
    origin: Origin | None = None  # of a weights-only folder, whose own `iteration` is 0
    merged: bool = False  # adapters are merged into the weights; the stored optimizer state is theirs
    counts_tokens: bool = True  # False: the source may record only the embedding rows, as HRM-Text's folders do

    def part_of(self, kind: str, entry: Rename) -> torch.Tensor:
        """Read one tensor of this kind of weights; falls back to raw for an untrained tensor, which has no EMA, and if
        this kind is not stored, as in a model before its first step."""
        return self.read(kind if entry.trained and kind in self.parts else RAW, entry)

    def require(self, kind: str) -> None:
        """Refuse a kind of weights that is not stored; before the first step the EMA equals the weights."""
        if self.origin and self.origin.kind not in (None, kind):
            raise ConfigError(f"{self.path}: holds the {str(self.origin.kind).upper()} weights of iteration "
                              f"{self.origin.iteration} alone; leave --weights {kind} out")
        if kind not in self.parts and (kind != EMA or self.iteration):
            raise ConfigError(f"{self.path}: holds no {kind.upper()} weights, only {', '.join(sorted(self.parts))}; "
                              f"choose --weights {RAW if kind == EMA else EMA}")

    def check_asked(self, kind: str | None) -> None:
        """Refuse --weights for a weights-only folder that does not record its kind."""
        if kind and self.origin and self.origin.kind is None:
            raise ConfigError(f"--weights {kind}: {self.path} holds weights of one kind and does not say of which; "
                              "leave the flag out")

    @property
    def tokens_known(self) -> bool:
        """Whether the architecture's vocab_size is the number of tokens, and not only of embedding rows."""
        return self.counts_tokens or self.architecture.vocab_size != self.architecture.padded_vocab_size

    def takes(self, num_tokens: int) -> bool:
        """Return whether a tokenizer, or data, with `num_tokens` tokens can belong to the model: exactly the model's
        number if that is known, else at most as many as there are rows."""
        size = self.architecture.vocab_size
        return num_tokens == size if self.tokens_known else num_tokens <= size

    def weights(self, kind: str = EMA) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (Megatron's name, unsharded tensor), one at a time; `kind` is "ema" or "raw" (fp32 masters)."""
        self.require(kind)
        for entry in table(self.architecture):
            yield entry.megatron, self.part_of(kind, entry)

    def only_weights(self, kind: str) -> Checkpoint:
        """Return the weights of this kind as a model before its first step."""
        self.require(kind)
        return replace(self, iteration=0, embedding_updates=0, parts=frozenset({RAW}),
                       read=lambda _, entry: self.part_of(kind, entry))

    @property
    def step(self) -> int:
        """The iteration that the weights come from."""
        return self.origin.iteration if self.origin else self.iteration

    def named(self, kind: str) -> str | None:
        """Return the true kind of the weights that are read as `kind`; None if it is not recorded."""
        return self.origin.kind if self.origin else kind

    def default_kind(self) -> str:
        """Return the kind that is read by default: the EMA if there is one."""
        return (self.origin and self.origin.kind) or (EMA if EMA in self.parts else RAW)

    @property
    def has_state(self) -> bool:
        """Whether optimizer state and EMA are stored completely."""
        return self.parts >= frozenset(PARTS)

    def state(self, part: str, entry: Rename) -> torch.Tensor:
        """Read a part of one trained tensor in fp32; a part that is not stored is as before the first step."""
        if part in self.parts:
            return self.read(part, entry).float()
        return self.read(RAW, entry).float() if part == EMA else torch.zeros(entry.shape)
