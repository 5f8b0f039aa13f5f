"""Which examples train, which validate and which test."""
from __future__ import annotations

import numpy as np

from hrm_megatron.config import ConfigError
from hrm_megatron.data.shuffle import stream_key
from hrm_megatron.data.walk import blocks

SPLIT_STREAM = 969_301  # keeps the split's numbers apart from those of the epochs
PARTS = ("train", "valid", "test")


def split_weights(split: str) -> list[float]:
    """Read the weights of train, valid and test; they sum to 1."""
    try:
        weights = [float(weight) for weight in split.split(",")]
    except ValueError:
        weights = []
    if not 1 <= len(weights) <= 3 or not np.isfinite(weights).all() or min(weights) < 0 or sum(weights) <= 0:
        raise ConfigError(f"split={split!r}: give up to three weights for train, valid, test, for example 97,3,0")
    return [weight / sum(weights) for weight in weights + [0.0] * (3 - len(weights))]


def split_sizes(count: int, split: str) -> list[int]:
    """Count the examples of each part of `count` in the proportions of `split`, where each stands for itself.

    A part with a positive weight gets at least one example while training has more than one to give.
    """
    weights = split_weights(split)
    sizes = [int(count * weight) for weight in weights]
    largest = int(np.argmax(weights))
    sizes[largest] += count - sum(sizes)
    for part, weight in enumerate(weights):
        if weight and not sizes[part] and sizes[largest] > 1:
            sizes[part], sizes[largest] = 1, sizes[largest] - 1
    return sizes


def example_parts(count: int, split: str, seed: int, prompt_keys: np.ndarray | None = None) -> np.ndarray:
    """Part of each example (0 train, 1 valid, 2 test), [count] uint8.

    With `prompt_keys` [count], examples of one prompt are in one part: that of the prompt's place in a range that is
    cut in the proportions of `split`, whatever other examples there are. Without, `split_sizes` examples of each part
    are chosen.
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
        _leave_none_empty(parts, weights, np.asarray(prompt_keys))
    return parts


def _leave_none_empty(parts: np.ndarray, weights: list[float], prompt_keys: np.ndarray) -> None:
    """Give a part of positive weight that chance has left empty the prompt of the lowest key of the largest part."""
    largest = int(np.argmax(weights))
    for part, weight in enumerate(weights):
        if weight and not (parts == part).any():
            candidates = prompt_keys[parts == largest]
            if len(candidates) and candidates.min() != candidates.max():
                parts[prompt_keys == candidates.min()] = part
