"""Open the data that the command line names, and hand Megatron its datasets of packed rows."""
from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.datasets.utils import Split

from hrm_megatron.attention.prefix_lm import context_loads
from hrm_megatron.config import ConfigError
from hrm_megatron.data.batch import PackedBatch
from hrm_megatron.data.dataset import PackedRows, split_examples, split_sizes
from hrm_megatron.data.indexed_examples import IndexedExamples
from hrm_megatron.data.sampled import SampledFolder
from hrm_megatron.data.tokenizer import TextTokenizer
from hrm_megatron.training.evaluation import Evaluation

log = logging.getLogger(__name__)

MEASURED_ROWS = 64  # whose examples stand for all, in FLOPs and in the shares of context parallel ranks

Source = IndexedExamples | SampledFolder
Datasets = tuple[PackedRows | None, PackedRows | None, PackedRows | None]


@dataclass(frozen=True)
class Sources:
    """What a run reads; `split` says that one indexed dataset serves training, validation and test."""

    train: Source
    valid: IndexedExamples | None
    test: IndexedExamples | None
    split: bool

    @property
    def vocab_size(self) -> int:
        return self.train.vocab_size

    def held_out(self, split: str) -> tuple[int, int]:
        """Count the examples of validation and of test."""
        if self.split:
            assert isinstance(self.train, IndexedExamples)
            _, valid, test = split_sizes(len(self.train), split)
            return valid, test
        return len(self.valid or ()), len(self.test or ())

    def why_no_validation(self, split: str) -> str:
        """Say why there is nothing to validate on, and the way out."""
        if self.split:
            assert isinstance(self.train, IndexedExamples)
            return (f"--split {split} leaves none of the {len(self.train)} examples to validate on; give another, or "
                    "--train-data-path and --valid-data-path")
        return "there is nothing to validate on; give --valid-data-path PREFIX for that"

    @property
    def indexed(self) -> list[IndexedExamples]:
        """The indexed datasets among them."""
        return [source for source in (self.train, self.valid, self.test) if isinstance(source, IndexedExamples)]

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
    if args.skip_train and not (train or args.sampled_data_path):
        train = parts["valid"] or parts["test"]  # for its vocabulary; nobody trains on it
    if bool(train) == bool(args.sampled_data_path):
        raise ConfigError("no training data, or two kinds of it: give either --data-path PREFIX (or --train-data-path) "
                          "or --sampled-data-path DIR")
    stores = {name: IndexedExamples(path) for name, path in (("train", train), *list(parts.items())[1:]) if path}
    if args.tokenizer_model:
        fingerprint = TextTokenizer(args.tokenizer_model).fingerprint
        for store in stores.values():
            store.check_tokenizer(fingerprint)
    source = stores.get("train") or SampledFolder(args.sampled_data_path)
    for name, store in stores.items():
        if store.vocab_size != source.vocab_size:
            raise ConfigError(f"--{name}-data-path {parts[name]}: made with a vocabulary of {store.vocab_size}, the "
                              f"training data with {source.vocab_size}; preprocess both with one tokenizer")
    if args.verify_data:
        if isinstance(source, SampledFolder):
            raise ConfigError("--verify-data: the folder of --sampled-data-path has no checksums; leave it out")
        for store in stores.values():
            store.blocks()  # refused where there are none, before anything is built
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


def plan_evaluations(args: argparse.Namespace, evaluation: Evaluation, valid: PackedRows | None,
                     test: PackedRows | None) -> None:
    """Give the held-out parts as many rows as evaluations will read, now that their rows are counted."""
    rows = args.eval_global_batch_size
    if valid:
        evaluations = valid.num_rows // (args.eval_iters * rows)
        if evaluation.whole:
            args.eval_iters = evaluation.cover(valid, rows)
        # A checkpoint of a run with other intervals may have read more of them than this run ever will.
        valid.num_rows = args.consumed_valid_samples + evaluations * args.eval_iters * rows
        valid.split = Split.valid
    if test:
        if evaluation.whole:
            evaluation.test_iters = evaluation.cover(test, rows)
        test.num_rows, test.split = evaluation.test_iters * rows, Split.test
    if evaluation.whole:
        for name, part, iters in (("validation", valid, args.eval_iters), ("test", test, evaluation.test_iters)):
            if part:
                log.info(f"data: {name}: all {part.rows_per_epoch} rows in {iters} iterations of {rows}")


def datasets_provider(args: argparse.Namespace, sources: Sources, evaluation: Evaluation,
                      on_ready: Callable[[PackedRows | None], None]) -> Callable[..., Datasets]:
    """Make Megatron's datasets provider; `on_ready` is called with the training rows when training may begin."""
    def rows(name: str, source: Source | None, count: int, **options: object) -> PackedRows | None:
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
        # Rows per step may have been others before: what was read is counted in rows, what is left in steps.
        left = args.consumed_train_samples + (args.train_iters - args.iteration) * args.global_batch_size
        train = 0 if args.skip_train else max(num_samples[0], left)
        valid, test = num_samples[1] * evaluation.validates, num_samples[2] * evaluation.tests
        if torch.distributed.get_rank() and args.data_cache_path:
            torch.distributed.barrier()  # rank 0 plans the rows, the others read its plan
        if sources.split:
            assert isinstance(sources.train, IndexedExamples)
            parts = split_examples(len(sources.train), args.split, args.seed)
            found: Datasets = (
                rows("training", sources.train, train, example_ids=parts.train),
                rows("validation", sources.train, valid, example_ids=parts.valid, fixed=True),
                rows("test", sources.train, test, example_ids=parts.test, fixed=True))
        else:
            found = (rows("training", sources.train, train), rows("validation", sources.valid, valid, fixed=True),
                     rows("test", sources.test, test, fixed=True))
        if not torch.distributed.get_rank() and args.data_cache_path:
            torch.distributed.barrier()
        plan_evaluations(args, evaluation, found[1], found[2])
        on_ready(found[0])
        return found

    provide.is_distributed = True  # type: ignore[attr-defined]  # every rank reads for itself: no broadcast of batches
    return provide
