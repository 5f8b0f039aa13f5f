"""Split examples into train, valid and test."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from hrm_megatron.config import ConfigError
from hrm_megatron.data.shuffle import stream_key
from hrm_megatron.data.walk import blocks

SPLIT_STREAM = 969_301  # a stream of its own, independent of the epochs' permutations
PARTS = ("train", "valid", "test")


def split_weights(split: str) -> list[float]:
    """Parse the weights of train, valid and test and normalize them to sum to 1."""
    try:
        weights = [float(weight) for weight in split.split(",")]
    except ValueError:
        weights = []
    if not 1 <= len(weights) <= 3 or not np.isfinite(weights).all() or min(weights) < 0 or sum(weights) <= 0:
        raise ConfigError(f"split={split!r}: give up to three weights for train, valid, test, for example 97,3,0")
    return [weight / sum(weights) for weight in weights + [0.0] * (3 - len(weights))]


def split_sizes(count: int, split: str) -> list[int]:
    """Return the sizes of the parts of `count` examples in the proportions of `split`, when examples are split one by
    one.

    A part with a positive weight gets at least one example as long as the largest part has more than one.
    """
    weights = split_weights(split)
    sizes = [int(count * weight) for weight in weights]
    largest = int(np.argmax(weights))
    sizes[largest] += count - sum(sizes)
    for part, weight in enumerate(weights):
        if weight and not sizes[part] and sizes[largest] > 1:
            sizes[part], sizes[largest] = 1, sizes[largest] - 1
    return sizes


def example_parts(count: int, split: str, seed: int, prompt_keys: np.ndarray | None = None,
                  given: Mapping[int, int] = MappingProxyType({})) -> np.ndarray:
    """Return the part of each example (0 train, 1 valid, 2 test), [count] uint8.

    With `prompt_keys` [count], all examples with the same prompt are in the same part: the key, mixed with the seed,
    falls into a range cut in the proportions of `split`, independent of all other examples; `given` (part -> key)
    overrides that. Without keys, `split_sizes` examples are drawn for each part.
    """
    from hrm_megatron.data.kernels import order_between, parts_by_key

    key, parts = stream_key(seed, SPLIT_STREAM), np.empty(count, np.uint8)
    sizes = split_sizes(count, split)
    weights = split_weights(split)
    for start, stop in blocks(0, count):
        if prompt_keys is None:
            place = order_between(start, stop, count, key)
            parts[start:stop] = np.add(place >= sizes[0], place >= sizes[0] + sizes[1], dtype=np.uint8)
        else:
            train_end, valid_end = (np.uint64(min(int(share * 2**64), 2**64 - 1)) for share in np.cumsum(weights[:2]))
            last = max(part for part, weight in enumerate(weights) if weight)
            parts[start:stop] = parts_by_key(np.ascontiguousarray(prompt_keys[start:stop]), key, train_end, valid_end,
                                             last)
    if prompt_keys is not None:
        for part, prompt in given.items():
            parts[np.asarray(prompt_keys) == np.uint64(prompt)] = part
    return parts


def prompts_for_empty_parts(datasets: Sequence[tuple[int, np.ndarray | None]], split: str, seed: int) -> dict[int, int]:
    """Return part -> prompt key for each part of positive weight that would be empty over all `datasets`, given as
    (number of examples, prompt keys): the lowest keys of the largest part.

    The largest part keeps at least one prompt: a part for which no other is left stays empty.
    """
    weights = split_weights(split)
    found = np.zeros(len(PARTS), bool)
    for count, keys in datasets:
        if keys is None:
            found |= np.array(split_sizes(count, split)) > 0
            continue
        for start, stop in blocks(0, count):  # usually the first block already has all parts
            parts = example_parts(stop - start, split, seed, keys[start:stop])
            found |= [(parts == part).any() for part in range(len(PARTS))]
            if all(found[part] for part, weight in enumerate(weights) if weight):
                return {}
    largest = int(np.argmax(weights))
    candidates = np.unique(np.concatenate([np.empty(0, np.uint64), *(
        keys[example_parts(count, split, seed, keys) == largest] for count, keys in datasets if keys is not None)]))
    empty = [part for part, weight in enumerate(weights) if weight and not found[part]]
    return {part: int(key) for part, key in zip(empty, candidates[:-1], strict=False)}
