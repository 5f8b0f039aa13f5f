"""Open the data that the command line names, and hand Megatron its datasets of packed rows."""
from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from hrm_megatron.attention.prefix_lm import context_loads
from hrm_megatron.config import ConfigError
from hrm_megatron.data.batch import PackedBatch
from hrm_megatron.data.dataset import PackedRows, split_store
from hrm_megatron.data.sampled import SampledFolder
from hrm_megatron.data.store import ExampleStore
from hrm_megatron.data.tokenizer import TextTokenizer

# Three in a hundred for validation. None for a test part: Megatron would log its loss as one more "validation".
DEFAULT_SPLIT = "97,3,0"
log = logging.getLogger(__name__)

MEASURED_ROWS = 64  # whose examples stand for all, in FLOPs and in the shares of context parallel ranks

Source = ExampleStore | SampledFolder
Datasets = tuple[PackedRows | None, PackedRows | None, PackedRows | None]


@dataclass(frozen=True)
class Sources:
    """What a run reads; `split` says that one store serves training, validation and test."""

    train: Source
    valid: ExampleStore | None
    test: ExampleStore | None
    split: bool

    @property
    def vocab_size(self) -> int:
        return self.train.vocab_size

    @property
    def files(self) -> list[Path]:
        """All files that are read."""
        return [file for source in (self.train, self.valid, self.test) if source for file in source.files]


def _single(flag: str, paths: Sequence[str] | None) -> str | None:
    if not paths:
        return None
    if len(paths) > 1:
        raise ConfigError(f"{flag} {' '.join(paths)}: give one prefix; weighted blends are not built yet")
    return paths[0]


def open_sources(args: argparse.Namespace) -> Sources:
    """Open and check every file that the arguments name; raise ConfigError with one line otherwise."""
    whole = _single("--data-path", args.data_path)
    parts = {name: _single(f"--{name}-data-path", getattr(args, f"{name}_data_path"))
             for name in ("train", "valid", "test")}
    train = whole or parts["train"]
    if bool(train) == bool(args.sampled_data_path):
        raise ConfigError("no training data, or two kinds of it: give either --data-path PREFIX (or --train-data-path) "
                          "or --sampled-data-path DIR")
    stores = {name: ExampleStore(path) for name, path in (("train", train), *list(parts.items())[1:]) if path}
    if args.tokenizer_model:
        fingerprint = TextTokenizer(args.tokenizer_model).fingerprint
        for store in stores.values():
            store.check_tokenizer(fingerprint)
    source = stores.get("train") or SampledFolder(args.sampled_data_path)
    for name, store in stores.items():
        if store.vocab_size != source.vocab_size:
            raise ConfigError(f"--{name}-data-path {parts[name]}: made with a vocabulary of {store.vocab_size}, the "
                              f"training data with {source.vocab_size}; preprocess both with one tokenizer")
    return Sources(source, stores.get("valid"), stores.get("test"), split=bool(whole))


def first_lengths(rows: PackedRows) -> list[Sequence[tuple[int, int]]]:
    """The (prefix, response) lengths of the examples in the first rows: the same on every rank."""
    return [PackedBatch.from_row(rows[i]).lengths[0] for i in range(min(len(rows), MEASURED_ROWS))]


def describe_loads(rows: PackedRows, row_tokens: int, ranks: int) -> str:
    """Say how evenly the attention of the first rows is shared among context parallel ranks."""
    lengths = first_lengths(rows)
    loads = context_loads(lengths, row_tokens, ranks)
    return (f"context parallel: the busiest of {ranks} ranks has {max(loads) * ranks / sum(loads):.2f} times the mean "
            f"of the attention's (query, key) pairs, over {len(lengths)} rows")


def datasets_provider(args: argparse.Namespace, sources: Sources,
                      on_ready: Callable[[PackedRows | None], None]) -> Callable[..., Datasets]:
    """Make Megatron's datasets provider; `on_ready` is called with the training rows when training may begin."""
    def rows(name: str, source: Source | None, count: int | None, **options: object) -> PackedRows | None:
        if source is None or not count:
            return None
        dataset = PackedRows(source, args.seq_length, args.seed, count, cache_folder=args.data_cache_path,
                             **options)  # type: ignore[arg-type]
        log.info("data: %s: %s", name, dataset.describe())
        if name == "training" and args.context_parallel_size > 1:
            log.info("data: %s", describe_loads(dataset, args.seq_length, args.context_parallel_size))
        return dataset

    def provide(num_samples: Sequence[int], vp_stage: int | None = None) -> Datasets:
        if vp_stage:
            return None, None, None  # the chunk of tick 0 reads for all
        train, valid, test = num_samples
        if torch.distributed.get_rank() and args.data_cache_path:
            torch.distributed.barrier()  # rank 0 plans the rows, the others read its plan
        if sources.split:
            assert isinstance(sources.train, ExampleStore)
            parts = split_store(len(sources.train), args.split or DEFAULT_SPLIT, args.seed)
            found: Datasets = (
                rows("training", sources.train, train, example_ids=parts.train),
                rows("validation", sources.train, len(parts.valid) and valid, example_ids=parts.valid, fixed=True),
                rows("test", sources.train, len(parts.test) and test, example_ids=parts.test, fixed=True))
        else:
            found = (rows("training", sources.train, train), rows("validation", sources.valid, valid, fixed=True),
                     rows("test", sources.test, test, fixed=True))
        if not torch.distributed.get_rank() and args.data_cache_path:
            torch.distributed.barrier()
        on_ready(found[0])
        return found

    provide.is_distributed = True  # type: ignore[attr-defined]  # every rank reads for itself: no broadcast of batches
    return provide
