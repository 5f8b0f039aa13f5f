"""Attention with the KV cache: bidirectional over prompts, then one position of each answer at a time.

Each class is called once per tick and layer with gqkv [n, 4 h] = [gate | query | key | value]. It rotates queries and
keys, writes keys and values to the cache, and returns the gated attention [n, h].
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from hrm_megatron.attention.rotary import Rotation
from hrm_megatron.generate.cache import BLOCK_TOKENS, PagedCache
from hrm_megatron.generate.cpu import Loops
from hrm_megatron.layers.functions import gated
from hrm_megatron.layers.on_cpu import numbers, threads_for


def halves(gqkv: torch.Tensor, head_dim: int) -> np.ndarray:
    """Return gqkv [n, 4 h] as a numpy view [n, 4, heads, 2, head_dim / 2] for compiled loops."""
    return numbers(gqkv).reshape(len(gqkv), 4, -1, 2, head_dim // 2)


def positions_of(lengths: Sequence[int], tables: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the position [n] and block [n] of each token of packed prompts."""
    positions = np.concatenate([np.arange(length) for length in lengths])
    blocks = np.concatenate([table[np.arange(length) // BLOCK_TOKENS]
                             for table, length in zip(tables, lengths, strict=True)])
    return positions, blocks


class Prefill:
    """Attention over whole packed prompts: each position attends to all of its own prompt, in a `causal` model only to
    earlier positions."""

    def __init__(self, cache: PagedCache, lengths: Sequence[int], tables: Sequence[np.ndarray], theta: float,
                 causal: bool = False) -> None:
        device = cache.pool.device
        positions, blocks = positions_of(lengths, tables)
        self.cache, self.lengths, self.causal = cache, list(lengths), causal
        self.blocks = torch.as_tensor(blocks, dtype=torch.long, device=device)
        self.places = torch.as_tensor(positions % BLOCK_TOKENS, device=device)
        self.rotation = Rotation.of(torch.as_tensor(positions, device=device)[None], cache.size.head_dim, theta)

    def __call__(self, slot: int, gqkv: torch.Tensor) -> torch.Tensor:
        heads, d = self.cache.size.heads, self.cache.size.head_dim
        gate, *qkv = gqkv.chunk(4, -1)
        query, key, value = (part.view(-1, 1, heads, d) for part in qkv)  # [n, 1, heads, d]
        query, key = self.rotation(query, key)
        keys, values = self.cache.keys(slot), self.cache.values(slot)
        keys[self.blocks, :, :, self.places] = key.squeeze(1)
        values[self.blocks, :, self.places] = value.squeeze(1)
        prompts = zip(*(part.permute(1, 2, 0, 3).split(self.lengths, 2) for part in (query, key, value)), strict=True)
        found = [F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)[0].transpose(0, 1).flatten(1)
                 for q, k, v in prompts]
        return gated(torch.cat(found), gate)


class PrefillInLoops:
    """`Prefill` on a CPU; the gated attention is rounded once more than in `Paged`."""

    def __init__(self, cache: PagedCache, lengths: Sequence[int], tables: Sequence[np.ndarray], loops: Loops,
                 causal: bool = False) -> None:
        self.positions, self.blocks = positions_of(lengths, tables)
        self.lengths, self.loops, self.causal, self.size = list(lengths), loops, causal, cache.size
        self.pool = numbers(cache.pool.flatten(2))  # [slot, key or value, all blocks]

    def __call__(self, slot: int, gqkv: torch.Tensor) -> torch.Tensor:
        loops, n, heads, d = self.loops, len(gqkv), self.size.heads, self.size.head_dim
        qkv, out = gqkv.new_empty(3, heads, n, d), gqkv.new_empty(n, heads, d)
        source, rotated = halves(gqkv, d), numbers(qkv).reshape(3, heads, n, 2, d // 2)
        threads = threads_for(gqkv.nbytes)
        loops.kernels.enter_rows(threads, source, *self.pool[slot], self.blocks, self.positions, loops.cos, loops.sin,
                                 rotated)
        prompts = (prompt.unbind() for prompt in qkv.unsqueeze(1).split(self.lengths, 3))
        attended = torch.cat([F.scaled_dot_product_attention(q, k, v, is_causal=self.causal) for q, k, v in prompts], 2)
        loops.kernels.gate_rows(threads, source, numbers(attended[0]), numbers(out))
        return out.flatten(1)


class Gathered:
    """Attention of one new position of each answer, by torch on any device: the reference for `Paged`."""

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
        keys, values = self.cache.keys(slot), self.cache.values(slot)
        keys[self.own, :, :, self.places] = key.squeeze(1)
        values[self.own, :, self.places] = value.squeeze(1)
        # [b, blocks, heads, positions, d] > [b, heads, keys, d]
        keys, values = (part[self.tables].transpose(1, 2).flatten(2, 3) for part in (keys.mT, values))
        found = F.scaled_dot_product_attention(query.transpose(1, 2), keys, values, attn_mask=self.allowed)
        return gated(found.flatten(1), gate)


class Paged:
    """Attention of one new position of each answer on a CPU, reading the blocks in place; the gated attention is
    rounded once."""

    def __init__(self, cache: PagedCache, lengths: np.ndarray, tables: np.ndarray, loops: Loops) -> None:
        self.loops, self.lengths, self.tables = loops, lengths, tables
        self.pool = numbers(cache.pool.flatten(2))  # [slot, key or value, all blocks]
        row_bytes = cache.size.bytes // (cache.size.slots * cache.size.blocks * BLOCK_TOKENS)
        self.read_bytes = int(lengths.sum() + len(lengths)) * row_bytes

    def __call__(self, slot: int, gqkv: torch.Tensor) -> torch.Tensor:
        out = gqkv.new_empty(len(gqkv), gqkv.shape[1] // 4)
        loops = self.loops
        loops.kernels.attend_rows(
            threads_for(self.read_bytes), halves(gqkv, loops.cos.shape[1] * 2), *self.pool[slot], self.tables,
            self.lengths, loops.cos, loops.sin, numbers(out))
        return out
