"""Weights and their state as a checkpoint has them, of which each data parallel rank holds a shard of a flat buffer.

A bucket of DDP's buffer has weights side by side and is cut into equal shards, one for each rank: a weight lies on one
rank, or on several in a row. A checkpoint needs it in one piece, on one rank: that which holds its middle. Most lie
there already, and a rank sends and receives parts of the two at its ends only. Stock code brings all weights of all
ranks to each of them (`get_parameter_state_dp_zero` in distrib_optimizer.py).
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch


class Part(NamedTuple):
    """Elements `start` to `end` of a weight lie on `rank`; the whole weight belongs to `owner`."""

    weight: int
    rank: int
    owner: int
    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start


def parts_of_bucket(places: Mapping[int, tuple[int, int]], shard_size: int) -> list[Part]:
    """Say where the weights of a bucket lie: `places` are their elements [start, end) of it, by number, ascending."""
    found = []
    for weight, (start, end) in places.items():
        for rank in range(start // shard_size, -(-end // shard_size)):
            first, last = max(start, rank * shard_size), min(end, (rank + 1) * shard_size)
            found.append(Part(weight, rank, (start + end) // 2 // shard_size, first - start, last - start))
    return found


class Bucket:
    """The weights of a bucket as parts on the ranks of `group`; what is exchanged goes through `device`."""

    def __init__(self, parts: Sequence[Part], group: torch.distributed.ProcessGroup, device: torch.device) -> None:
        self.group, self.device, own = group, device, group.rank()
        self.held = [part for part in parts if part.rank == own]
        self.owned = [part for part in parts if part.owner == own]
        self.is_exchanged = any(part.rank != part.owner for part in parts)  # the same on all ranks

    def gather(self, held: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Return the whole weights [n] that this rank owns, by number, from the parts [m] that ranks hold of them.

        A weight that lies on its owner alone is the tensor that was given.
        """
        brought = self._exchange([held[part.weight] for part in self.held], self.held, lambda part: part.owner,
                                 self.owned, lambda part: part.rank)
        pieces: dict[int, list[torch.Tensor]] = {}
        for part, piece in zip(self.owned, brought, strict=True):
            pieces.setdefault(part.weight, []).append(piece)
        return {weight: parts[0] if len(parts) == 1 else torch.cat(parts) for weight, parts in pieces.items()}

    def scatter(self, whole: Mapping[int, torch.Tensor]) -> dict[int, torch.Tensor]:
        """Return the parts [m] that this rank holds, by number of the weight, from the whole ones [n] at owners."""
        brought = self._exchange([whole[part.weight][part.start:part.end] for part in self.owned],
                                 self.owned, lambda part: part.rank, self.held, lambda part: part.owner)
        return {part.weight: piece for part, piece in zip(self.held, brought, strict=True)}

    def _exchange(self, tensors: Sequence[torch.Tensor], parts: Sequence[Part], to: Callable[[Part], int],
                  wanted: Sequence[Part], sender: Callable[[Part], int]) -> list[torch.Tensor]:
        """Send `tensors`, one of each of `parts`, and return those of the `wanted` ones; own ones stay as they are."""
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
        """Count the elements of parts by the rank that each goes to, or comes from."""
        sizes = [0] * self.group.size()
        for part in parts:
            sizes[rank_of(part)] += part.size
        return sizes
