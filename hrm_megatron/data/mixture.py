"""Epochs drawn from one or several datasets, by weights, by sampling rules or completely; no data is copied."""
from __future__ import annotations

import bisect
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from hrm_megatron.config import ConfigError
from hrm_megatron.data.indexed_examples import IndexedExamples, SourceRange
from hrm_megatron.data.kept_examples import dataset_digest, kept_digest, kept_mask
from hrm_megatron.data.sampling_rules import Rule, Rules
from hrm_megatron.data.shuffle import Ints, stream_key
from hrm_megatron.data.split import PARTS, example_parts, prompts_for_empty_parts
from hrm_megatron.data.walk import Pair, Window, blocks, check_lengths, row_lengths, smallest_dtype

# Planning packs an example into one number: its id above, its positions in the low bits. Examples are read in random
# order, which costs a cache miss per array.
LENGTH_BITS = 24
LENGTH_MASK = np.uint64((1 << LENGTH_BITS) - 1)
MAX_ROW_TOKENS = (1 << LENGTH_BITS) - 2  # one length above it stays to mark examples that are too long
WALK_STREAM = 20_421  # a stream of its own, independent of the orders of epochs and of the split


@dataclass(frozen=True)
class Selection:
    """Which examples of the datasets a run uses, by part, and in which mixture.

    `weights` are shares of the tokens of an epoch, one per dataset; `rules` apply to the sources of all datasets. Both
    affect training only: validation and test take each of their examples once.
    """

    split: str | None = None
    seed: int = 0
    rules: Rules | None = None
    weights: tuple[float, ...] = ()


class Mixture:
    """One part (train, valid, test) of datasets, as a `Walk`: example i of dataset k has the id `first[k] + i`.

    `example_ids` selects examples directly, instead of the part.
    """

    def __init__(self, stores: Sequence[IndexedExamples], row_tokens: int, selection: Selection = Selection(),
                 part: str = "train", example_ids: Ints | None = None) -> None:
        assert not (selection.rules and selection.weights)
        self.stores = tuple(stores)
        self.row_tokens = row_tokens
        self.selection = selection
        self.part = part
        self.example_ids = example_ids
        self.first = np.cumsum([0, *map(len, stores)])  # first id of each dataset, and the end
        self.vocab_size = stores[0].vocab_size
        self.id_dtype = smallest_dtype(int(self.first[-1]))
        self.sources = [[*store.sources] if selection.rules else [SourceRange(store.prefix, 0, len(store))]
                        for store in stores]  # without rules a dataset counts as one source
        names = [source.name for sources in self.sources for source in sources]
        self._rules = selection.rules.assign(names, part == "train") if selection.rules else [Rule()] * len(names)
        self._identity: str | None = None

    @property
    def size(self) -> int:
        return int(self.first[-1])

    def count_examples(self) -> dict[str, int]:
        """Return the number of examples of each part, from one pass."""
        counts = dict.fromkeys(PARTS, 0)
        for k in range(len(self.stores)):
            found = self.parts_of(k)
            for number, part in enumerate(PARTS):
                counts[part] += int(np.count_nonzero(found == number))
        return counts

    def identity(self, epoch: int) -> str:
        if self._identity is None:
            self._identity = repr((*self._examples_of, self.part, *self._split_of, self.selection.seed,
                                   self.selection.weights, self._rules if self.selection.rules else None))
        return self._identity

    @property
    def contents(self) -> str:
        """Identify the examples of a held-out part, whatever their order: each of them is taken once."""
        seed = self.selection.seed if self.selection.split else None
        cut = [rule.long_context for rule in self._rules] if self.selection.rules else None
        return repr((*self._examples_of, self.part, *self._split_of, seed, cut))

    @cached_property
    def _split_of(self) -> tuple[object, ...]:
        split = self.selection.split  # older versions split each dataset by itself, mostly with the same parts
        together = len(self.stores) > 1 and any(self._prompts_given_in([store]) != self.given_prompts
                                                for store in self.stores)
        return (split, "of all together") if together else (split,)

    @cached_property
    def _examples_of(self) -> tuple[object, str | None]:
        chosen = None if self.example_ids is None else hashlib.sha256(self.example_ids).hexdigest()
        return [(dataset_digest(store), kept_digest(store)) for store in self.stores], chosen

    @property
    def folder(self) -> Path:
        return Path(f"{self.stores[0].prefix}.rows")

    def check(self, row_tokens: int) -> None:
        if row_tokens > MAX_ROW_TOKENS:
            raise ConfigError(f"rows of {row_tokens} positions: there are at most {MAX_ROW_TOKENS}; choose a smaller "
                              "--seq-length")
        if self.selection.rules:  # rules truncate or drop long examples
            return
        for store in self.stores:
            for start, stop in blocks(0, len(store)) if len(store) else [(0, 0)]:
                check_lengths(row_lengths(*store.lengths(start, stop)), row_tokens, store.example_name, start)

    def epoch(self, epoch: int) -> MixedEpoch:
        return MixedEpoch(self, epoch)

    def example(self, epoch: int, i: int) -> Pair:
        store, own = self._placed(i)
        prefix, target = self.stores[store][own]
        return prefix, target[:self.row_tokens + 1 - len(prefix)]  # only rules that truncate let longer ones in

    def example_name(self, epoch: int, i: int) -> str:
        store, own = self._placed(i)
        return self.stores[store].example_name(own)

    def source_names(self, most: int) -> SourceNames:
        """Return the names of the sources of all examples; of the datasets if there are more than `most` sources."""
        prefixes = [Path(os.path.abspath(store.prefix)) for store in self.stores]
        datasets = [(name, int(first)) for name, first in zip(distinct_tails(prefixes), self.first, strict=False)]
        found = SourceNames([(source.name if len(datasets) == 1 else f"{dataset}/{source.name}", first + source.first)
                             for store, (dataset, first) in zip(self.stores, datasets, strict=True)
                             for source in store.sources])
        return found if len(found.names) <= most else SourceNames(datasets)

    def parts_of(self, k: int) -> np.ndarray:
        """Return the part of each example of dataset k, uint8 [n]; len(PARTS) if it is not kept or not selected."""
        store, split, own = self.stores[k], self.selection.split, PARTS.index(self.part)
        if self.example_ids is not None:
            parts = np.full(len(store), len(PARTS), np.uint8)
            ids = np.asarray(self.example_ids, np.int64) - self.first[k]
            parts[ids[(ids >= 0) & (ids < len(store))]] = own
            return parts
        parts = (example_parts(len(store), split, self.selection.seed, store.prompt_keys(), self.given_prompts)
                 if split else np.full(len(store), own, np.uint8))
        kept = kept_mask(store)
        if kept is not None:
            parts[~kept] = len(PARTS)
        return parts

    @cached_property
    def given_prompts(self) -> dict[int, int]:
        """Prompt keys by part, for parts that chance would have left empty: see `prompts_for_empty_parts`."""
        return self._prompts_given_in(self.stores)

    def _prompts_given_in(self, stores: Sequence[IndexedExamples]) -> dict[int, int]:
        if not self.selection.split:
            return {}
        return prompts_for_empty_parts([(len(store), store.prompt_keys()) for store in stores],
                                       self.selection.split, self.selection.seed)

    def unfit(self) -> dict[str, tuple[int, int]]:
        """Return, by source, how many examples of this part rules leave out for their lengths, and how many it has."""
        found = {}
        rules = iter(self._rules)
        for k, sources in enumerate(self.sources if self.selection.rules else ()):
            parts = self.parts_of(k) == PARTS.index(self.part)
            for source, rule in zip(sources, rules, strict=False):
                own = parts[source.first:source.first + source.count]
                lengths = self.stores[k].lengths(source.first, source.first + source.count)
                if left_out := int(np.count_nonzero(own & ~rule.eligible(*lengths, self.row_tokens + 1))):
                    found[source.name] = left_out, int(own.sum())
        return found

    def streams(self) -> Iterator[tuple[Rule, Iterator[Ints]]]:
        """Yield for each source its rule, and its examples of this part as blocks of `packed` numbers."""
        rules = iter(self._rules)
        for k, sources in enumerate(self.sources):
            chosen = self.parts_of(k)
            for source, rule in zip(sources, rules, strict=False):
                yield rule, self._examples(k, source, rule, chosen)

    def _examples(self, k: int, source: SourceRange, rule: Rule, parts: np.ndarray) -> Iterator[Ints]:
        longest = self.row_tokens if self.selection.rules else MAX_ROW_TOKENS + 1
        for start, stop in blocks(source.first, source.first + source.count):
            prefixes, targets = self.stores[k].lengths(start, stop)
            of_part = parts[start:stop] == PARTS.index(self.part)
            if self.selection.rules:
                of_part &= rule.eligible(prefixes, targets, self.row_tokens + 1)
            own = np.flatnonzero(of_part)
            lengths = np.minimum(row_lengths(prefixes, targets), longest)
            yield packed(own + (start + self.first[k]), lengths[own])

    def _placed(self, i: int) -> tuple[int, int]:
        store = int(np.searchsorted(self.first, i, side="right")) - 1
        return store, i - int(self.first[store])


class SourceNames:
    """Source names, and the name number of each example; `begins` lists (name, id of its first example) by id."""

    def __init__(self, begins: Sequence[tuple[str, int]]) -> None:
        self.names = tuple(dict.fromkeys(name for name, _ in begins))
        self._first = [first for _, first in begins]
        numbers = {name: number for number, name in enumerate(self.names)}
        self._number = [numbers[name] for name, _ in begins]

    def __call__(self, i: int) -> int:
        return self._number[bisect.bisect_right(self._first, i) - 1]


def distinct_tails(paths: Sequence[Path]) -> list[str]:
    """Shorten paths to the fewest trailing parts that still distinguish them."""
    def tails(parts: int) -> list[str]:
        return ["/".join(path.parts[-parts:]) for path in paths]
    deepest, different = max(len(path.parts) for path in paths), len({*paths})
    return next((tails(parts) for parts in range(1, deepest) if len({*tails(parts)}) == different), [*map(str, paths)])


class MixedEpoch:
    """One epoch of a mixture, loaded for planning."""

    def __init__(self, mixture: Mixture, epoch: int) -> None:
        selection = mixture.selection
        self.number, self.key, self.id_dtype = epoch, stream_key(selection.seed, epoch), mixture.id_dtype
        examples = np.empty(mixture.size, np.uint64)  # over-allocated: untouched pages cost no physical memory
        rules: list[Rule] = []
        firsts, tokens = [0], []
        for rule, found in mixture.streams():
            count, positions = firsts[-1], 0
            for block in found:
                examples[count:count + len(block)] = block
                count += len(block)
                positions += int((block & LENGTH_MASK).sum(dtype=np.int64))
            rules.append(rule)
            firsts.append(count)
            tokens.append(positions)
        self.examples = examples[:firsts[-1]]
        sizes = np.diff(firsts).tolist()
        if selection.rules and mixture.part == "train" and mixture.example_ids is None:
            selection.rules.check_sizes(rules, sizes, mixture.row_tokens)
        quotas = sizes
        if mixture.part == "train":
            quotas = [rule.per_epoch(size) for rule, size in zip(rules, sizes, strict=True)]
            if selection.weights:
                quotas = weighted_quotas(selection.weights, sizes, tokens)
        streams = [(quota, size, first, stream_key(selection.seed, WALK_STREAM, k)) for k, (quota, size, first) in
                   enumerate(zip(quotas, sizes, firsts, strict=False)) if quota]
        if not streams:
            of = f" of --split {selection.split}" if selection.split else ""
            raise ConfigError(f"no examples to pack in part {mixture.part!r}{of}; check the input, --split and "
                              "--seq-length")
        self.begins = np.cumsum([0, *(quota for quota, *_ in streams)])
        self.sizes, self.firsts = (np.array([stream[i] for stream in streams], np.int64) for i in (1, 2))
        self.keys = np.array([key for *_, key in streams], np.uint64)

    def __len__(self) -> int:
        return int(self.begins[-1])

    def window(self, start: int, stop: int) -> Window:
        from hrm_megatron.data.kernels import draw, gather

        places = draw(start, stop, self.number, self.key, self.begins, self.firsts, self.sizes, self.keys)
        window = Window(np.empty(len(places), self.id_dtype), np.empty(len(places), np.int32))
        gather(self.examples, places, LENGTH_BITS, *window)
        return window


def packed(ids: Ints, lengths: Ints) -> Ints:
    """Pack ids [n] and lengths [n] into numbers [n] uint64; overwrites `ids`."""
    ids <<= LENGTH_BITS
    ids |= lengths
    return ids.view(np.uint64)


def weighted_quotas(weights: Sequence[float], sizes: Sequence[int], tokens: Sequence[int]) -> list[int]:
    """Return how many examples each dataset gives to an epoch, which has as many positions as all datasets together;
    `sizes` and `tokens` are the examples and positions of each."""
    if not all(tokens):
        raise ConfigError("a weighted dataset has no examples in its training part; check --split, or leave it out")
    share = sum(tokens) / sum(weights)
    return [max(1, round(weight * share * size / own)) for weight, size, own in zip(weights, sizes, tokens,
                                                                                    strict=True)]
