"""A walk over lengths alone, for tests of planning."""
import hashlib
from pathlib import Path

import numpy as np

from hrm_megatron.data.shuffle import random_order
from hrm_megatron.data.walk import Window, check_lengths


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
