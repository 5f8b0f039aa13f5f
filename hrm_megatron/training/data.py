"""Open the data that the command line names, and provide Megatron's datasets of packed rows."""
from __future__ import annotations

import argparse
import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.core.datasets.utils import Split

from hrm_megatron.attention.balance import balanced_order
from hrm_megatron.attention.prefix_lm import context_loads
from hrm_megatron.config import CAUSAL, ConfigError, refuse_beside
from hrm_megatron.data.batch import PackedBatch
from hrm_megatron.data.dataset import PackedRows
from hrm_megatron.data.indexed_examples import IndexedExamples
from hrm_megatron.data.kept_examples import kept_count, kept_files
from hrm_megatron.data.mixture import Mixture, Selection
from hrm_megatron.data.plan import RowPlan
from hrm_megatron.data.plan_cache import writable_folder
from hrm_megatron.data.sampled import SampledFolder
from hrm_megatron.data.sampling_rules import read_rules
from hrm_megatron.data.tokenizer import TextTokenizer
from hrm_megatron.data.walk import Walk
from hrm_megatron.training.agreement import digest
from hrm_megatron.training.blend import Blend
from hrm_megatron.training.evaluation import Evaluation

log = logging.getLogger(__name__)

CACHED_EXAMPLES = 1 << 20  # fewer are planned in a fraction of a second
NAMED_SOURCES = 5
MEASURED_ROWS = 64  # sample for the FLOPs and for the load balance of context parallel ranks

BLENDS = {"whole": "data_path", "train": "train_data_path", "valid": "valid_data_path", "test": "test_data_path"}
Datasets = tuple[PackedRows | None, PackedRows | None, PackedRows | None]


@dataclass(frozen=True)
class Sources:
    """The data of a run by part; `split`: the same datasets are split into training, validation and test."""

    train: Walk
    valid: Mixture | None
    test: Mixture | None
    split: bool
    stores: tuple[IndexedExamples, ...]

    @property
    def vocab_size(self) -> int:
        return self.train.vocab_size

    def held_out(self) -> tuple[int, int]:
        """Return the numbers of validation and test examples."""
        if self.split and self.valid:
            counts = self.valid.count_examples()
            return counts["valid"], counts["test"]
        return (self.valid.count_examples()["valid"] if self.valid else 0,
                self.test.count_examples()["test"] if self.test else 0)

    def why_no_validation(self, split: str) -> str:
        """Return why there are no validation examples, and what to do."""
        if self.split:
            return (f"--split {split} leaves none of the {sum(map(len, self.stores))} examples to validate on; give "
                    "another, or --train-data-path and --valid-data-path")
        return "there is nothing to validate on; give --valid-data-path PREFIX for that"

    @property
    def files(self) -> list[Path]:
        """All files that are read."""
        folder = self.train.files if isinstance(self.train, SampledFolder) else []
        return [*folder, *(file for store in self.stores for file in store.files)]


def open_sources(args: argparse.Namespace) -> Sources:
    """Open and check every data file that the arguments name; raise ConfigError with one line if one is wrong."""
    flags = {name: f"--{argument.replace('_', '-')}" for name, argument in BLENDS.items()}
    blends = {name: Blend.of(flags[name], getattr(args, argument)) for name, argument in BLENDS.items()}
    whole, train = blends["whole"], blends["whole"] or blends["train"]
    refuse_beside("--data-path", {flags[name]: whole and blends[name] for name in BLENDS if name != "whole"})
    if args.skip_train and not (train or args.sampled_data_path):
        train = blends["valid"] or blends["test"]  # for its vocabulary; it is not trained on
    if bool(train) == bool(args.sampled_data_path):
        raise ConfigError("no training data, or two kinds of it: give either --data-path PREFIX (or --train-data-path) "
                          "or --sampled-data-path DIR")
    if args.sampling_rules and not train:
        raise ConfigError("--sampling-rules: a sampled folder has been sampled; give --data-path PREFIX")
    if args.sampling_rules and train and train.weights:
        raise ConfigError(f"--sampling-rules: is incompatible with the weights of {train.flag}: leave them out, and "
                          "let max_per_file and repeat decide")
    tokenizer = TextTokenizer(args.tokenizer_model) if args.tokenizer_model else None
    fingerprint = tokenizer and tokenizer.fingerprint
    args.vocabulary = tokenizer and tokenizer.vocabulary  # for the checkpoints
    stores: dict[str, IndexedExamples] = {}
    given = [blend for blend in (train, blends["valid"], blends["test"]) if blend]
    for path in [path for blend in given for path in blend.paths]:
        stores[path] = stores.get(path) or IndexedExamples(path)
        if fingerprint:
            stores[path].check_tokenizer(fingerprint)
    folder = None if train else SampledFolder(args.sampled_data_path)
    vocab_size = folder.vocab_size if folder else next(iter(stores.values())).vocab_size
    for blend in given:
        for path in blend.paths:
            if stores[path].vocab_size != vocab_size:
                raise ConfigError(f"{blend.flag} {path}: made with a vocabulary of {stores[path].vocab_size}, the "
                                  f"training data with {vocab_size}; preprocess both with one tokenizer")
    if args.verify_data:
        if folder:
            raise ConfigError("--verify-data: the folder of --sampled-data-path has no checksums; leave it out")
        for store in stores.values():
            store.blocks()  # raises ConfigError if there are no checksums
    for store in stores.values():
        if (kept := kept_count(store)) is not None:
            log.info("data: %s: %d of %d examples are kept, as %s says", store.prefix, kept, len(store),
                     kept_files(store.prefix)[1])
        if args.data_path and store.prompt_keys() is None:
            log.info("data: %s was made without keys of its prompts: --split divides examples, and one question may be "
                     "in two parts; preprocess it again for a split by question", store.prefix)
    rules = read_rules(args.sampling_rules) if args.sampling_rules else None

    def mixture(blend: Blend | None, part: str) -> Mixture | None:
        if not blend:
            return None
        split = args.split.replace(" ", "") if whole else None  # Megatron's default has blanks in it
        selection = Selection(split, args.seed, rules, blend.weights)
        return Mixture([stores[path] for path in blend.paths], args.seq_length, selection, part)

    walk = folder or mixture(train, "train")
    assert walk
    valid = mixture(whole or blends["valid"], "valid")
    for part in valid.given_prompts if valid else ():
        log.info("data: %s: chance has left it empty, so it has one question, which training has again when the data "
                 "grows", ("training", "validation", "test")[part])
    args.data_digests = {"train": digest_of(walk.identity(0)), "valid": valid and digest_of(valid.contents)}
    if folder:  # its identity covers only the lengths of an epoch
        epochs = [digest(folder.epoch_files(epoch)) for epoch in range(folder.epochs)]
        args.data_digests |= {"tokens": digest([folder.tokens_file]), "epochs": epochs}
    return Sources(walk, valid, mixture(whole or blends["test"], "test"), bool(whole), tuple(stores.values()))


def digest_of(described: str) -> str:
    """Return the hash of a description of data, to be stored in checkpoints."""
    return hashlib.sha256(described.encode()).hexdigest()


def first_rows(rows: PackedRows) -> tuple[list[Sequence[tuple[int, int]]], int]:
    """Return the (prefix, response) lengths of the examples in each of the first rows, and the number of labels in
    these rows; the same on every rank."""
    batches = [PackedBatch.from_row(rows[i]) for i in range(min(len(rows), MEASURED_ROWS))]
    return [batch.lengths[0] for batch in batches], sum(len(batch.label_index) for batch in batches)


def describe_unfit(walk: Mixture) -> str | None:
    """Return one line about the examples that are dropped because they do not fit a row, or None."""
    if not (unfit := walk.unfit()):
        return None
    named = [f"{count} of {of} of {name}" for name, (count, of) in unfit.items()]
    more = f" and {len(named) - NAMED_SOURCES} more sources" if len(named) > NAMED_SOURCES else ""
    return (f"{sum(count for count, _ in unfit.values())} examples do not fit rows of {walk.row_tokens} tokens, or "
            f"have no response, and are left out: {', '.join(named[:NAMED_SOURCES])}{more}")


def describe_loads(rows: PackedRows, row_tokens: int, ranks: int) -> str:
    """Return one line about the load balance of attention over context parallel ranks in the first rows."""
    lengths = [[pairs[i] for i in balanced_order(pairs, row_tokens, ranks)] for pairs in first_rows(rows)[0]]
    loads = context_loads(lengths, row_tokens, ranks)
    return (f"context parallel: the busiest of {ranks} ranks has {max(loads) * ranks / sum(loads):.2f} times the mean "
            f"of the attention's (query, key) pairs, over {len(lengths)} rows")


def count_evaluations(args: argparse.Namespace) -> int:
    """Return the maximum number of validations of a run: one per interval and one at the end (Megatron's own count
    can be one too low with --start-eval-at-iter)."""
    return 1 + (0 if args.skip_train else args.train_iters // args.eval_interval)


def plan_evaluations(args: argparse.Namespace, evaluation: Evaluation, valid: PackedRows | None,
                     test: PackedRows | None) -> None:
    """Set the number of rows of the held-out parts to what evaluations will read."""
    rows = args.eval_global_batch_size
    if valid:
        evaluations = count_evaluations(args)
        args.consumed_valid_samples //= evaluation.counted_passes
        if evaluation.whole:
            args.eval_iters = evaluation.cover(valid, rows)
        # A checkpoint of a run with other intervals may have consumed more rows than this run ever will.
        valid.num_rows = args.consumed_valid_samples + evaluations * args.eval_iters * rows * evaluation.passes
        valid.read_again(evaluation.passes, args.eval_iters * rows, args.consumed_valid_samples)
        valid.split = Split.valid
    if test:
        if evaluation.whole:
            evaluation.test_iters = evaluation.cover(test, rows)
        test.num_rows, test.split = evaluation.test_iters * rows * evaluation.passes, Split.test
        test.read_again(evaluation.passes, evaluation.test_iters * rows, 0)
    if evaluation.whole:
        for name, part, iters in (("validation", valid, args.eval_iters), ("test", test, evaluation.test_iters)):
            if part:
                log.info(f"data: {name}: all {part.rows_per_epoch} rows in {iters} iterations of {rows}")


def plan_folder(args: argparse.Namespace, walk: Walk) -> Path | None:
    """Return the folder in which planned rows are cached for all processes, or None if each process plans faster than
    it would wait for the cache."""
    if args.dry_run:  # a dry run writes nothing
        return None
    if args.data_cache_path:
        return Path(args.data_cache_path)
    if walk.size < CACHED_EXAMPLES:
        return None
    return writable_folder(walk.folder, *([Path(args.save) / "rows"] if args.save else []))


def count_rows(args: argparse.Namespace, sources: Sources) -> int:
    """Count the rows of the first epoch."""
    plan = RowPlan(sources.train, args.seq_length, args.seed, plan_folder(args, sources.train))
    return len(plan.rows_of_epoch(0))


def datasets_provider(args: argparse.Namespace, sources: Sources, evaluation: Evaluation,
                      on_ready: Callable[[PackedRows | None], None],
                      source_of: Callable[[int], int] | None = None) -> Callable[..., Datasets]:
    """Return Megatron's datasets provider. `on_ready` is called with the training rows once the datasets are built;
    `source_of` maps a training example to the number of its source."""
    def rows(name: str, walk: Walk | None, count: int, fixed: bool = False) -> PackedRows | None:
        if walk is None or not count:
            return None
        dataset = PackedRows(walk, args.seq_length, args.seed, count, fixed=fixed,
                             cache_folder=plan_folder(args, walk), causal=args.attention_mask == CAUSAL,
                             loss_on_prefix=args.loss_on_prefix)
        if name == "training":
            dataset.source_of = source_of
        log.info("data: %s: %s", name, dataset.describe())
        if name == "training" and isinstance(walk, Mixture) and not args.rank and (unfit := describe_unfit(walk)):
            log.info("data: %s: %s", name, unfit)
        if name == "training" and args.context_parallel_size > 1:
            log.info("data: %s", describe_loads(dataset, args.seq_length, args.context_parallel_size))
        return dataset

    def provide(num_samples: Sequence[int], vp_stage: int | None = None) -> Datasets:
        if vp_stage:
            return None, None, None  # the chunk of tick 0 reads for all
        # The batch size may have changed: what was consumed is counted in rows, what is left in steps.
        steps = max(1, args.train_iters - args.iteration)  # at least 1: Megatron's loader refuses to start at the end
        left = args.consumed_train_samples + steps * args.global_batch_size
        train = 0 if args.skip_train else max(num_samples[0], left)
        found = (rows("training", sources.train, train),  # plan_evaluations sets the number of the others
                 rows("validation", sources.valid, int(evaluation.validates), fixed=True),
                 rows("test", sources.test, int(evaluation.tests), fixed=True))
        plan_evaluations(args, evaluation, found[1], found[2])
        on_ready(found[0])
        return found

    provide.is_distributed = True  # type: ignore[attr-defined]  # every rank reads by itself, without a broadcast
    return provide
