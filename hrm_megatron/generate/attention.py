"""Attention against the cache: prompts both ways, then one position of each answer at a time.

Each class is called once per tick and layer with gqkv [n, 4 h] = [gate | query | key | value] and returns the gated
attention [n, h]; it rotates queries and keys, and writes keys and values to the cache.
"""
from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F

from hrm_megatron.attention.rotary import Rotation
from hrm_megatron.generate.cache import BLOCK_TOKENS, PagedCache
from hrm_megatron.layers.functions import gated

THREAD_BYTES = 1 << 20  # of cache that is worth a thread


class Prefill:
    """Whole prompts, packed one after the other: each position sees all of its own prompt, both ways."""

    def __init__(self, cache: PagedCache, lengths: Sequence[int], tables: Sequence[np.ndarray], theta: float) -> None:
        device = cache.pool.device
        positions = np.concatenate([np.arange(length) for length in lengths])
        blocks = np.concatenate([table[np.arange(length) // BLOCK_TOKENS]
                                 for table, length in zip(tables, lengths, strict=True)])
        self.cache, self.lengths = cache, list(lengths)
        self.blocks = torch.as_tensor(blocks, dtype=torch.long, device=device)
        self.places = torch.as_tensor(positions % BLOCK_TOKENS, device=device)
        self.rotation = Rotation.of(torch.as_tensor(positions, device=device)[None], cache.size.head_dim, theta)

    def __call__(self, slot: int, gqkv: torch.Tensor) -> torch.Tensor:
        heads, d = self.cache.size.heads, self.cache.size.head_dim
        gate, *qkv = gqkv.chunk(4, -1)
        query, key, value = (part.view(-1, 1, heads, d) for part in qkv)  # [n, 1, heads, d]
        query, key = self.rotation(query, key)
        keys, values = self.cache.pool[slot]
        keys[self.blocks, :, self.places] = key.squeeze(1)
        values[self.blocks, :, self.places] = value.squeeze(1)
        prompts = zip(*(part.permute(1, 2, 0, 3).split(self.lengths, 2) for part in (query, key, value)), strict=True)
        found = [F.scaled_dot_product_attention(*prompt)[0].transpose(0, 1).flatten(1) for prompt in prompts]
        return gated(torch.cat(found), gate)


class Gathered:
    """One new position of each answer, by torch on any device: the definition of `Paged`."""

    def __init__(self, cache: PagedCache, lengths: np.ndarray, tables: np.ndarray, theta: float) -> None:
        device = cache.pool.device
        self.cache = cache
        positions = torch.as_tensor(lengths, dtype=torch.long, device=device)
        self.tables = torch.as_tensor(tables, dtype=torch.long, device=device)
        self.own = self.tables.gather(1, (positions // BLOCK_TOKENS)[:, None]).squeeze(1)
        self.places = positions % BLOCK_TOKENS
        self.rotation = Rotation.of(positions[None], cache.size.head_dim, theta)
        seen = torch.arange(tables.shape[1] * BLOCK_TOKENS, device=device)
        self.allowed = (seen <= positions[:, None])[:, None, None]  # [b, 1, 1, keys]

    def __call__(self, slot: int, gqkv: torch.Tensor) -> torch.Tensor:
        heads, d = self.cache.size.heads, self.cache.size.head_dim
        gate, *qkv = gqkv.chunk(4, -1)
        query, key, value = (part.view(-1, 1, heads, d) for part in qkv)
        query, key = self.rotation(query, key)
        pool = self.cache.pool[slot]
        pool[0][self.own, :, self.places] = key.squeeze(1)
        pool[1][self.own, :, self.places] = value.squeeze(1)
        # [b, blocks, heads, positions, d] > [b, heads, keys, d]
        keys, values = (part[self.tables].transpose(1, 2).flatten(2, 3) for part in pool)
        found = F.scaled_dot_product_attention(query.transpose(1, 2), keys, values, attn_mask=self.allowed)
        return gated(found.flatten(1), gate)


class Paged:
    """One new position of each answer on a CPU, where the blocks lie; the gated attention is rounded once."""

    def __init__(self, cache: PagedCache, lengths: np.ndarray, tables: np.ndarray, rotations: CpuRotations) -> None:
        from hrm_megatron.generate.kernels import attend_rows  # late: numba takes half a second

        self.kernel, self.cache, self.lengths, self.tables = attend_rows, cache, lengths, tables
        self.pool = (cache.pool.view(torch.uint16) if cache.size.dtype == torch.bfloat16 else cache.pool).numpy()
        self.cos, self.sin = rotations.cos, rotations.sin
        row_bytes = int(lengths.mean() + 1) * cache.size.bytes // (cache.size.slots * cache.size.blocks * BLOCK_TOKENS)
        self.parts = max(1, min(rotations.threads, len(lengths), len(lengths) * row_bytes // THREAD_BYTES))
        self.threads = rotations.pool

    def __call__(self, slot: int, gqkv: torch.Tensor) -> torch.Tensor:
        rows = len(gqkv)
        out = torch.empty(rows, gqkv.shape[1] // 4)
        arguments = (gqkv.float().numpy(), *self.pool[slot], self.tables, self.lengths, self.cos, self.sin)
        if self.parts == 1:
            self.kernel(*arguments, 0, rows, out.numpy())
        else:
            ends = [rows * part // self.parts for part in range(self.parts + 1)]
            list(self.threads.map(lambda first, last: self.kernel(*arguments, first, last, out.numpy()),
                                  ends[:-1], ends[1:]))
        return out.to(gqkv.dtype)


class CpuRotations:
    """What all steps of a CPU share: cosines and sines [context, d/2] of every position, and as many threads as
    torch's."""

    def __init__(self, context_tokens: int, head_dim: int, theta: float) -> None:
        rotation = Rotation.of(torch.arange(context_tokens)[None], head_dim, theta)
        self.cos = rotation.cos[:, 0, 0, :head_dim // 2].contiguous().numpy()
        self.sin = rotation.sin[:, 0, 0].contiguous().numpy()
        self.threads = torch.get_num_threads()
        self.pool = ThreadPoolExecutor(self.threads)
