"""A walk over lengths alone, for tests of planning."""
import hashlib
from pathlib import Path

import numpy as np

from hrm_megatron.data.kernels import order_between
from hrm_megatron.data.shuffle import stream_key
from hrm_megatron.data.walk import Window, check_lengths


def random_order(count, *numbers):
    """Permute range(count) by the numbers."""
    return order_between(0, count, count, stream_key(*numbers))


def scattered(value):
    """The finalizer of SplitMix64, in Python's integers."""
    mask = 2**64 - 1
    value = ((value & mask) ^ (value & mask) >> 30) * 0xBF58476D1CE4E5B9 & mask
    value = (value ^ value >> 27) * 0x94D049BB133111EB & mask
    return value ^ value >> 31


def feistel(index, count, key):
    """Element `index` of a permutation by its definition."""
    bits = max(8, (count - 1).bit_length())
    while True:
        low = bits // 2
        for number in range(8):
            x = scattered((index & (1 << low) - 1) + key + number * 0x9E3779B97F4A7C15)
            index = (index & (1 << low) - 1) << bits - low | (index >> low) ^ x >> 64 - (bits - low)
            low = bits - low
        if index < count:
            return index


class ListWalk:
    """Example i of an epoch takes `epoch_lengths(epoch)[i]` positions; shuffled by `seed`, None: as they are."""

    vocab_size, id_dtype, folder = 10, np.dtype(np.uint32), Path("unused")

    def __init__(self, epoch_lengths, seed):
        self.epoch_lengths, self.seed = epoch_lengths, seed

    def identity(self, epoch):
        return hashlib.sha256(np.ascontiguousarray(self.epoch_lengths(epoch))).hexdigest() + str(self.seed)

    def check(self, row_tokens):
        check_lengths(self.epoch_lengths(0), row_tokens, "example {}".format)

    def epoch(self, epoch):
        lengths = np.asarray(self.epoch_lengths(epoch), np.int32)
        order = np.arange(len(lengths)) if self.seed is None else random_order(len(lengths), self.seed, epoch)
        return ListEpoch(order.astype(np.uint32), lengths[order])


class ListEpoch:
    def __init__(self, ids, lengths):
        self.ids, self.lengths = ids, lengths

    def __len__(self):
        return len(self.ids)

    def window(self, start, stop):
        return Window(self.ids[start:stop], self.lengths[start:stop])
