"""Paged KV cache: one pool of fixed-size blocks for all ticks, layers and answers."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import psutil
import torch

from hrm_megatron.config import Architecture, ConfigError

BLOCK_TOKENS = 16
RESERVE_BYTES = 256 << 20  # of free memory left for everything else


def blocks_of(tokens: int) -> int:
    """Return the number of blocks that `tokens` positions need."""
    return -(-tokens // BLOCK_TOKENS)


def free_bytes(device: torch.device) -> int:
    """Return the free bytes of memory on `device`."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    torch.cuda.empty_cache()  # memory that torch's allocator has cached is free too
    return torch.cuda.mem_get_info(device)[0]


@dataclass(frozen=True)
class CacheSize:
    """Sizes of a cache. `slots` is ticks x layers: each tick of a stack has its own keys and values, although ticks
    share the weights."""

    blocks: int
    slots: int
    heads: int
    head_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, architecture: Architecture, ticks: int, blocks: int, dtype: torch.dtype) -> CacheSize:
        return cls(blocks, ticks * architecture.num_layers, architecture.num_attention_heads, architecture.head_dim,
                   dtype)

    @property
    def shape(self) -> tuple[int, ...]:
        """[slot, key or value, block, head, elements of its positions]."""
        return self.slots, 2, self.blocks, self.heads, BLOCK_TOKENS * self.head_dim

    @property
    def bytes(self) -> int:
        return self.slots * 2 * self.blocks * self.heads * BLOCK_TOKENS * self.head_dim * self.dtype.itemsize

    def fits(self, free: int) -> bool:
        """Whether the cache and RESERVE_BYTES fit into `free` bytes."""
        return self.bytes + RESERVE_BYTES <= free

    def check(self, device: torch.device, way_out: str = "lower --batch-size or --max-new-tokens") -> str:
        """Return a line with the cache's size and the free memory; raises ConfigError, with `way_out`, if it does not
        fit."""
        free = free_bytes(device)
        said = (f"{self.bytes / 1e6:,.1f} MB for {self.blocks * BLOCK_TOKENS} positions in {self.slots} ticks x "
                f"layers, {free / 1e6:,.1f} MB are free")
        if not self.fits(free):
            raise ConfigError(f"key-value cache: needs {said}, of which {RESERVE_BYTES / 1e6:,.1f} MB are left for all "
                              f"else; {way_out}, or take --dtype bfloat16")
        return f"key-value cache: {said}"


class PagedCache:
    """The pool and its free blocks. Blocks are reference-counted; a block with several users is read-only."""

    def __init__(self, size: CacheSize, device: torch.device | str = "cpu") -> None:
        self.size = size
        # Zeros: unwritten positions have weight 0, but 0 * NaN would be NaN.
        if torch.device(device).type == "cpu":
            # numpy requests huge pages, with which attention reads its scattered blocks 20 % faster.
            self.pool = torch.from_numpy(np.zeros(size.bytes, np.uint8)).view(size.dtype).view(size.shape)
        else:
            self.pool = torch.zeros(size.shape, dtype=size.dtype, device=device)
        self._free = list(range(size.blocks))[::-1]
        self._users = [0] * size.blocks

    def keys(self, slot: int) -> torch.Tensor:
        """Return a view of the keys, [block, head, head_dim, position]: a query is multiplied with 16 of them at
        once."""
        return self.pool[slot, 0].unflatten(-1, (self.size.head_dim, BLOCK_TOKENS))

    def values(self, slot: int) -> torch.Tensor:
        """Return a view of the values, [block, head, position, head_dim]."""
        return self.pool[slot, 1].unflatten(-1, (BLOCK_TOKENS, self.size.head_dim))

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self) -> int:
        block = self._free.pop()
        self._users[block] = 1
        return block

    def share(self, block: int) -> int:
        self._users[block] += 1
        return block

    def release(self, block: int, not_finite: bool = False) -> None:
        """Release a block. One that may hold NaN or infinity (`not_finite`) is zeroed for its next user."""
        self._users[block] -= 1
        if not self._users[block]:
            if not_finite:
                self.pool[:, :, block] = 0
            self._free.append(block)

    def copy(self, block: int) -> int:
        """Take a free block, copy the contents of `block` to it, and return it."""
        own = self.take()
        self.pool[:, :, own] = self.pool[:, :, block]
        return own
