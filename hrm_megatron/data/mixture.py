"""Epochs drawn from one or several datasets, by weights, by sampling rules or whole; nothing is copied."""
from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hrm_megatron.config import ConfigError
from hrm_megatron.data.indexed_examples import IndexedExamples, SourceRange
from hrm_megatron.data.kept_examples import dataset_digest, kept_digest, kept_mask
from hrm_megatron.data.sampling_rules import Rule, Rules
from hrm_megatron.data.shuffle import Ints, stream_key
from hrm_megatron.data.split import PARTS, example_parts, ids_where
from hrm_megatron.data.walk import Pair, Window, check_lengths, row_lengths, smallest_dtype

WALK_STREAM = 20_421  # keeps the walks of sources apart from the orders of epochs and from the split


@dataclass(frozen=True)
class Selection:
    """Which examples of datasets a run takes part by part, and in which mixture.

    `weights` are shares of the tokens of an epoch, one per dataset; `rules` hold for the sources in all of them. Both
    are of training: validation and test take each of their examples once.
    """

    split: str | None = None
    seed: int = 0
    rules: Rules | None = None
    weights: tuple[float, ...] = ()


class Mixture:
    """One part (train, valid, test) of datasets, as a `Walk`: example i of dataset k has the id `first[k] + i`.

    `example_ids` chooses examples by hand instead of by the part.
    """

    def __init__(self, stores: Sequence[IndexedExamples], row_tokens: int, selection: Selection = Selection(),
                 part: str = "train", example_ids: Ints | None = None) -> None:
        assert not (selection.rules and selection.weights)
        self.stores = tuple(stores)
        self.row_tokens = row_tokens
        self.selection = selection
        self.part = part
        self.example_ids = example_ids
        self.first = np.cumsum([0, *map(len, stores)])  # of each dataset, and of the next one
        self.vocab_size = stores[0].vocab_size
        self.id_dtype = smallest_dtype(int(self.first[-1]))
        self.sources = [[*store.sources] if selection.rules else [SourceRange(store.prefix, 0, len(store))]
                        for store in stores]  # without rules it does not matter what a dataset was made from
        names = [source.name for sources in self.sources for source in sources]
        self._rules = selection.rules.assign(names) if selection.rules else [Rule()] * len(names)
        self._identity: str | None = None

    @property
    def size(self) -> int:
        return int(self.first[-1])

    def count_examples(self) -> int:
        """Count the examples of this part."""
        return sum(len(self._chosen(k)) for k in range(len(self.stores)))

    def identity(self, epoch: int) -> str:
        if self._identity is None:
            chosen = None if self.example_ids is None else hashlib.sha256(self.example_ids).hexdigest()
            data = [(dataset_digest(store), kept_digest(store)) for store in self.stores]
            self._identity = repr((data, chosen, self.part, self.selection.split, self.selection.seed,
                                   self.selection.weights, self._rules if self.selection.rules else None))
        return self._identity

    @property
    def folder(self) -> Path:
        return Path(f"{self.stores[0].prefix}.rows")

    def check(self, row_tokens: int) -> None:
        if self.selection.rules:  # they truncate or drop
            return
        for store in self.stores:
            check_lengths(row_lengths(*store.lengths()), row_tokens, store.example_name)

    def epoch(self, epoch: int) -> MixedEpoch:
        return MixedEpoch(self, epoch)

    def example(self, epoch: int, i: int) -> Pair:
        store, own = self._placed(i)
        prefix, target = self.stores[store][own]
        return prefix, target[:self.row_tokens + 1 - len(prefix)]  # longer ones are there only where rules truncate

    def example_name(self, epoch: int, i: int) -> str:
        store, own = self._placed(i)
        return self.stores[store].example_name(own)

    def parts_of(self, store: int) -> np.ndarray:
        """Part of each example of a dataset, uint8 [n]; examples that are not kept are in none."""
        source, split = self.stores[store], self.selection.split
        parts = (example_parts(len(source), split, self.selection.seed, source.prompt_keys()) if split else
                 np.full(len(source), PARTS.index(self.part), np.uint8))
        kept = kept_mask(source)
        if kept is not None:
            parts[~kept] = len(PARTS)
        return parts

    def streams(self) -> Iterator[tuple[SourceRange, Rule, Ints, Ints]]:
        """Yield of each source of examples: what it is, its rule, ids [n] and the positions that each takes [n]."""
        rules = iter(self._rules)
        for k, store in enumerate(self.stores):
            chosen, first = self._chosen(k), self.id_dtype.type(self.first[k])
            prefixes, targets = store.lengths()
            lengths = row_lengths(prefixes, targets)
            borders = np.searchsorted(chosen, [source.first for source in self.sources[k]])
            for source, rule, own in zip(self.sources[k], rules, np.split(chosen, borders[1:]), strict=False):
                if self.selection.rules:
                    own = own[rule.eligible(prefixes[own], targets[own], self.row_tokens + 1)]
                    found = np.minimum(lengths[own], self.row_tokens)
                else:
                    found = lengths if len(own) == len(lengths) else lengths[own]
                yield source, rule, own + first if first else own, found

    def _chosen(self, k: int) -> Ints:
        """Examples of dataset k that are of this part, ascending numbers in it."""
        if self.example_ids is None:
            return ids_where(self.parts_of(k), PARTS.index(self.part)).astype(self.id_dtype, copy=False)
        ids = np.sort(self.example_ids)
        return (ids[slice(*np.searchsorted(ids, self.first[k:k + 2]))] - self.first[k]).astype(self.id_dtype)

    def _placed(self, i: int) -> tuple[int, int]:
        store = int(np.searchsorted(self.first, i, side="right")) - 1
        return store, i - int(self.first[store])


class MixedEpoch:
    """One epoch of a mixture, loaded for planning."""

    def __init__(self, mixture: Mixture, epoch: int) -> None:
        selection = mixture.selection
        self.number, self.key = epoch, stream_key(selection.seed, epoch)
        pieces = [(rule, ids, lengths) for _, rule, ids, lengths in mixture.streams()]
        self.ids, self.lengths = _joined([ids for _, ids, _ in pieces]), _joined([lengths for *_, lengths in pieces])
        sizes = [len(ids) for _, ids, _ in pieces]
        quotas = sizes
        if mixture.part == "train":
            quotas = [rule.per_epoch(size) for (rule, *_), size in zip(pieces, sizes, strict=True)]
            if selection.weights:
                quotas = weighted_quotas(selection.weights, sizes, self.lengths)
        streams = [(quota, size, first, stream_key(selection.seed, WALK_STREAM, k)) for k, (quota, size, first) in
                   enumerate(zip(quotas, sizes, np.cumsum([0, *sizes]), strict=False)) if quota]
        if not streams:
            raise ConfigError("no examples to pack; check the input and --split")
        self.begins = np.cumsum([0, *(quota for quota, *_ in streams)])
        self.sizes, self.firsts = (np.array([stream[i] for stream in streams], np.int64) for i in (1, 2))
        self.keys = np.array([key for *_, key in streams], np.uint64)

    def __len__(self) -> int:
        return int(self.begins[-1])

    def window(self, start: int, stop: int) -> Window:
        from hrm_megatron.data.kernels import draw

        places = draw(start, stop, self.number, self.key, self.begins, self.firsts, self.sizes, self.keys)
        return Window(self.ids[places], self.lengths[places])


def weighted_quotas(weights: Sequence[float], sizes: Sequence[int], lengths: Ints) -> list[int]:
    """Examples that each dataset gives to an epoch, which has as many tokens as all datasets together.

    `lengths` are the positions of all examples, dataset by dataset.
    """
    tokens = [int(part.sum(dtype=np.int64)) for part in np.split(lengths, np.cumsum(sizes)[:-1])]
    if not all(tokens):
        raise ConfigError("a weighted dataset has no examples in its training part; check --split, or leave it out")
    share = sum(tokens) / sum(weights)
    return [max(1, round(weight * share * size / own)) for weight, size, own in zip(weights, sizes, tokens,
                                                                                    strict=True)]


def _joined(arrays: list[Ints]) -> Ints:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
