"""Convert between shards of flat buffers, one per data parallel rank, and the whole weights that a checkpoint stores.

A bucket of DDP's buffer is cut into equal shards, one per rank, so a weight lies on one rank or on several consecutive
ones. A checkpoint stores each weight whole, saved by the rank that holds its middle element. Most weights already lie
on that rank alone; a rank exchanges only parts of the weights at the two ends of its shard. Stock code gathers all
weights on every rank (`get_parameter_state_dp_zero` in distrib_optimizer.py).
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch


class Part(NamedTuple):
    """Elements [start, end) of a weight, which lie on `rank`; `owner` saves the whole weight."""

    weight: int
    rank: int
    owner: int
    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start


def parts_of_bucket(places: Mapping[int, tuple[int, int]], shard_size: int) -> list[Part]:
    """Return the parts of the weights of a bucket. `places`: weight number to elements [start, end) of the bucket, in
    ascending order."""
    found = []
    for weight, (start, end) in places.items():
        for rank in range(start // shard_size, -(-end // shard_size)):
            first, last = max(start, rank * shard_size), min(end, (rank + 1) * shard_size)
            found.append(Part(weight, rank, (start + end) // 2 // shard_size, first - start, last - start))
    return found


class Bucket:
    """The weights of a bucket as parts on the ranks of `group`; exchanged tensors are sent from `device`."""

    def __init__(self, parts: Sequence[Part], group: torch.distributed.ProcessGroup, device: torch.device) -> None:
        self.group, self.device, own = group, device, group.rank()
        self.held = [part for part in parts if part.rank == own]
        self.owned = [part for part in parts if part.owner == own]
        self.is_exchanged = any(part.rank != part.owner for part in parts)  # the same on all ranks

    def gather(self, held: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Return the whole weights [n] that this rank owns, by number, from the parts [m] that this rank holds.

        A weight that lies entirely on its owner is returned as given, not copied.
        """
        brought = self._exchange([held[part.weight] for part in self.held], self.held, lambda part: part.owner,
                                 self.owned, lambda part: part.rank)
        pieces: dict[int, list[torch.Tensor]] = {}
        for part, piece in zip(self.owned, brought, strict=True):
            pieces.setdefault(part.weight, []).append(piece)
        return {weight: parts[0] if len(parts) == 1 else torch.cat(parts) for weight, parts in pieces.items()}

    def scatter(self, whole: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Return the parts [m] that this rank holds, by weight number, from the whole weights [n] that it owns."""
        brought = self._exchange([whole[part.weight][part.start:part.end] for part in self.owned],
                                 self.owned, lambda part: part.rank, self.held, lambda part: part.owner)
        return {part.weight: piece for part, piece in zip(self.held, brought, strict=True)}

    def _exchange(self, tensors: Sequence[torch.Tensor], parts: Sequence[Part], to: Callable[[Part], int],
                  wanted: Sequence[Part], sender: Callable[[Part], int]) -> list[torch.Tensor]:
        """Send `tensors`, one per part in `parts`, and return the tensors of `wanted`; those of this rank are not
        copied."""
        own = self.group.rank()
        given = {part: tensor.detach() for part, tensor in zip(parts, tensors, strict=True)}
        if self.is_exchanged:
            sent = sorted((part for part in parts if to(part) != own), key=to)
            brought = sorted((part for part in wanted if sender(part) != own), key=sender)
            out = torch.cat([torch.empty(0, device=self.device), *(
                given[part].to(self.device, torch.float32) for part in sent)])
            found_sizes, out_sizes = self._sizes(brought, sender), self._sizes(sent, to)
            found = out.new_empty(sum(found_sizes))
            torch.distributed.all_to_all_single(found, out, found_sizes, out_sizes, group=self.group)
            given |= dict(zip(brought, found.split([part.size for part in brought]), strict=True))
        return [given[part] for part in wanted]

    def _sizes(self, parts: Sequence[Part], rank_of: Callable[[Part], int]) -> list[int]:
        """Return the number of elements to send to, or receive from, each rank."""
        sizes = [0] * self.group.size()
        for part in parts:
            sizes[rank_of(part)] += part.size
        return sizes
