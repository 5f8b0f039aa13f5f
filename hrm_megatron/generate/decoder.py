"""The forward pass of generation: the same function as HRMModel, with a KV cache, inference only."""
from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import psutil
import torch
import torch.nn.functional as F

from hrm_megatron.config import ConfigError
from hrm_megatron.generate.attention import Gathered, Paged, Prefill, PrefillInLoops
from hrm_megatron.generate.cache import RESERVE_BYTES, CacheSize, PagedCache
from hrm_megatron.generate.cpu import Loops
from hrm_megatron.generate.early_exit import ends_after, ends_below, run_cycles
from hrm_megatron.generate.weights import LayerWeights, Weights
from hrm_megatron.layers.functions import normalize, swiglu
from hrm_megatron.layers.on_cpu import norm_in_loops, swiglu_in_loops
from hrm_megatron.model.recurrence import summed
from hrm_megatron.model.ticks import ticks_of

log = logging.getLogger(__name__)

Attention = Callable[[int, torch.Tensor], torch.Tensor]


class Prefilled(NamedTuple):
    """fp32 logits [n, v] of the first token of each answer and, with early exit, the number of H cycles [n] of each."""

    logits: torch.Tensor
    h_cycles: np.ndarray | None


class Decoder:
    """Compute the logits of next tokens. `h_cycles` and `l_cycles`, by default the architecture's, may differ from
    training. With `exit_threshold` an answer runs at most `h_cycles`, see early_exit.py."""

    def __init__(self, weights: Weights, context_tokens: int, h_cycles: int | None = None,
                 l_cycles: int | None = None, exit_threshold: float | None = None) -> None:
        a = weights.architecture
        self.architecture = a = replace(a, h_cycles=h_cycles or a.h_cycles, l_cycles=l_cycles or a.l_cycles)
        if exit_threshold is not None and a.h_cycles == 1:
            way_out = "" if "h_cycles" in a.kind.fixed else ", or give more --h-cycles"
            raise ConfigError(f"exit threshold {exit_threshold}: has no effect, of one H cycle of the {a.kind.title} "
                              f"none can be left out; do without it{way_out}")
        self.exit_threshold = exit_threshold
        self.weights, self.context_tokens = weights, context_tokens
        self.ticks = ticks_of(a)
        self.placements = {"H": a.h_norm_placement or a.norm_placement, "L": a.norm_placement}
        self.device, self.dtype = weights.embedding.device, weights.embedding.dtype
        self.loops = Loops(context_tokens, a.head_dim, a.rope_theta) if self.device.type == "cpu" else None

    @property
    def vocab_size(self) -> int:
        return self.weights.head.columns

    def prepare(self, rows: int, cache_bytes: int) -> None:
        """Repack the weights for batches of `rows` answers if that and a cache of `cache_bytes` fit into free
        memory."""
        more, free = sum(matrix.more_bytes(rows) for matrix in self.weights.matrices), psutil.virtual_memory().available
        if more and more + cache_bytes + RESERVE_BYTES > free:
            log.warning("weights stay in one layout, which is slower: a second one for %d answers at once takes %.2f "
                        "GB, and beside the cache %.2f GB are free", rows, more / 1e9, (free - cache_bytes) / 1e9)
            return
        for matrix in self.weights.matrices:
            matrix.prepare(rows)

    def cache_size(self, blocks: int) -> CacheSize:
        """Return the sizes of a cache of `blocks` blocks for this model."""
        return CacheSize.of(self.architecture, len(self.ticks), blocks, self.dtype)

    @torch.no_grad()
    def prefill(self, prompts: Sequence[Sequence[int]], tables: Sequence[np.ndarray],
                cache: PagedCache) -> Prefilled:
        """Process whole prompts and fill the cache; `tables` holds the blocks of each prompt."""
        lengths = np.asarray([len(prompt) for prompt in prompts])
        tokens = np.concatenate([np.asarray(prompt, dtype=np.int64) for prompt in prompts])

        def attending(rows: np.ndarray) -> Attention:
            of_rows, own, causal = lengths[rows].tolist(), [tables[row] for row in rows], self.architecture.causal
            if self.loops:
                return PrefillInLoops(cache, of_rows, own, self.loops, causal)
            return Prefill(cache, of_rows, own, self.architecture.rope_theta, causal)
        cycles = None
        if self.exit_threshold is None:
            states = self._states(tokens, attending(np.arange(len(lengths))))
        else:
            states, cycles = run_cycles(self, tokens, lengths, attending, ends_below(self.exit_threshold, lengths))
        return Prefilled(self._logits(states[np.cumsum(lengths) - 1]), cycles)

    @torch.no_grad()
    def decode(self, tokens: Sequence[int], lengths: np.ndarray, tables: np.ndarray, cache: PagedCache,
               h_cycles: np.ndarray | None = None) -> torch.Tensor:
        """Add one token to each answer and return the logits [b, v] of the next one in fp32.

        `lengths` [b] are the positions in the cache so far, `tables` [b, n] their blocks, including that of the new
        position. `h_cycles` [b] are those that `prefill` returned; None: all.
        """
        def attending(rows: np.ndarray) -> Attention:
            if self.loops:
                return Paged(cache, lengths[rows], tables[rows], self.loops)
            return Gathered(cache, lengths[rows], tables[rows], self.architecture.rope_theta)
        ids, every = np.asarray(tokens, dtype=np.int64), np.arange(len(tokens))
        if h_cycles is None:
            return self._logits(self._states(ids, attending(every)))
        return self._logits(run_cycles(self, ids, np.ones_like(every), attending, ends_after(h_cycles))[0])

    @torch.no_grad()
    def logits_at(self, tokens: np.ndarray, attend: Attention, places: np.ndarray) -> torch.Tensor:
        """Return the fp32 logits [n, v] at `places` among `tokens`; `attend` computes the attention."""
        return self._logits(self._states(tokens, attend)[torch.as_tensor(places, device=self.device)])

    def _logits(self, z_h: torch.Tensor) -> torch.Tensor:
        return self.weights.head(z_h).float()

    def _states(self, tokens: np.ndarray, attend: Attention) -> torch.Tensor:
        """Run all ticks over tokens [n] and return the final state [n, h]."""
        states = self.begin(tokens)
        for cycle in range(self.architecture.h_cycles):
            self.run_cycle(cycle, states, attend)
        return states[self.ticks[-1].writes]

    def begin(self, tokens: np.ndarray) -> dict[str, torch.Tensor]:
        """Return the states [n, h] that the first tick reads."""
        x = F.embedding(torch.as_tensor(tokens, device=self.device), self.weights.embedding)
        x = x * self.architecture.embedding_scale
        return {"H": x} if self.weights.z_l is None else {"H": x, "L": self.weights.z_l.expand_as(x)}

    def run_cycle(self, cycle: int, states: dict[str, torch.Tensor], attend: Attention) -> None:
        """Run the ticks of one H cycle; they replace entries of `states`."""
        ticks = len(self.ticks) // self.architecture.h_cycles
        for number, tick in enumerate(self.ticks[cycle * ticks:(cycle + 1) * ticks], start=cycle * ticks):
            inputs = summed(states, tick.reads)
            states[tick.writes] = self._stack(tick.stack, inputs, number * self.architecture.num_layers, attend)

    def _stack(self, stack: str, x: torch.Tensor, first_slot: int, attend: Attention) -> torch.Tensor:
        pre = self.placements[stack] == "pre"
        for slot, layer in enumerate(self.weights.stacks[stack], start=first_slot):
            x = self._pre_norm_layer(layer, x, slot, attend) if pre else self._post_norm_layer(layer, x, slot, attend)
        return self._norm(x) if pre else x

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        epsilon = self.architecture.norm_epsilon
        return norm_in_loops(x, epsilon) if self.loops else normalize(x, epsilon)[0]

    def _swiglu(self, x: torch.Tensor) -> torch.Tensor:
        return swiglu_in_loops(x) if self.loops else swiglu(x)

    def _pre_norm_layer(self, w: LayerWeights, x: torch.Tensor, slot: int, attend: Attention) -> torch.Tensor:
        x = w.attention_out(attend(slot, w.gqkv(self._norm(x))), x)
        return w.mlp_out(self._swiglu(w.gate_up(self._norm(x))), x)

    def _post_norm_layer(self, w: LayerWeights, x: torch.Tensor, slot: int, attend: Attention) -> torch.Tensor:
        x = self._norm(w.attention_out(attend(slot, w.gqkv(x)), x))
        return self._norm(w.mlp_out(self._swiglu(w.gate_up(x)), x))
