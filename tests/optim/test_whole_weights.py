"""Weights in parts on many ranks and whole on one of them, with threads as ranks."""
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from hrm_megatron.optim.whole_weights import Bucket, parts_of_bucket


class Ranks:
    """`all_to_all_single` among threads."""

    def __init__(self, count):
        self.count, self.barrier, self.sent = count, threading.Barrier(count, timeout=60), {}

    def group(self, rank):
        return SimpleNamespace(rank=lambda: rank, size=lambda: self.count)

    def exchange(self, found, out, found_sizes, out_sizes, group):
        self.sent[group.rank()] = out.split(out_sizes)
        self.barrier.wait()
        pieces = [self.sent[rank][group.rank()] for rank in range(self.count)]
        assert [len(piece) for piece in pieces] == found_sizes
        found.copy_(torch.cat(pieces))
        self.barrier.wait()


def places_of(sizes, gaps):
    places, end = {}, 0
    for number, (size, gap) in enumerate(zip(sizes, gaps, strict=True), start=7):
        places[number] = end + gap, end + gap + size
        end += gap + size
    return places, end


BUCKETS = {  # ranks, sizes of the weights, elements between them
    "one rank": (1, [5, 3], [0, 2]), "a weight for each": (3, [4, 4, 4], [0, 0, 0]),
    "one weight on all": (4, [30], [0]), "a large one between small ones": (4, [1, 2, 40, 3, 1], [0, 1, 0, 2, 1]),
    "ranks with padding alone": (8, [3, 2], [0, 0]),
    "many": (5, random.Random(3).choices(range(1, 40), k=30), random.Random(4).choices(range(3), k=30)),
}


@pytest.mark.parametrize("name", BUCKETS)
def test_whole_weights_are_gathered_on_one_rank_and_scattered_again(monkeypatch, name):
    count, sizes, gaps = BUCKETS[name]
    places, end = places_of(sizes, gaps)
    shard_size = -(-end // count) + (5 if "padding" in name else 0)
    flat = torch.rand(shard_size * count)
    ranks, parts = Ranks(count), parts_of_bucket(places, shard_size)
    monkeypatch.setattr(torch.distributed, "all_to_all_single", ranks.exchange)

    def on(rank):
        bucket = Bucket(parts, ranks.group(rank), flat.device)
        shard = flat[rank * shard_size:(rank + 1) * shard_size]
        held = {}
        for number, (start, stop) in places.items():
            first, last = max(0, start - rank * shard_size), min(shard_size, stop - rank * shard_size)
            if first < last:
                held[number] = shard[first:last]
        whole = bucket.gather(held)
        back = bucket.scatter(whole)
        assert back.keys() == held.keys() and all(torch.equal(back[number], held[number]) for number in held)
        return whole, sum(part.end - part.start for part in bucket.owned if part.rank != rank)

    with ThreadPoolExecutor(count) as pool:
        found = [*pool.map(on, range(count))]
    assert sorted(number for whole, _ in found for number in whole) == [*places]  # each once
    for whole, received in found:
        assert all(torch.equal(tensor, flat[slice(*places[number])]) for number, tensor in whole.items())
        assert received < 2 * max(sizes)


def test_a_weight_that_lies_on_one_rank_is_not_copied_and_nothing_is_sent():
    held = {7: torch.rand(4)}
    bucket = Bucket(parts_of_bucket({7: (0, 4), 8: (5, 9)}, 5), Ranks(2).group(0), torch.device("cpu"))
    assert bucket.gather(held)[7].data_ptr() == held[7].data_ptr()
