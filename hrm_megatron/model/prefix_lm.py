"""Who may see whom in a packed row: whole prefixes both ways, responses causally, nothing across examples."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from hrm_megatron.model.rotary import Rotation

Lengths = Sequence[Sequence[tuple[int, int]]]


@dataclass
class PrefixSequences:
    """The examples of a micro-batch: `lengths[row]` lists (prefix, response) positions in order, padding last.

    Travels through Megatron's layers as `packed_seq_params`: they hand on any object there untouched, also
    through recomputation, as long as its `qkv_format` is not "thd" (transformer/attention.py). `rotation`
    turns queries and keys to their positions; it is made once per micro-batch and read at every tick.
    """

    lengths: Lengths
    rotation: Rotation
    qkv_format: str = "sbhd"
    _biases: dict[tuple[int, int, torch.dtype, torch.device], torch.Tensor] = field(default_factory=dict, repr=False)

    def dense_mask(self, row: int, row_tokens: int) -> torch.Tensor:
        """Definition of the mask, [s, s] bool: True where the query (rows) may see the key (columns)."""
        allowed, start = torch.zeros(row_tokens, row_tokens, dtype=torch.bool), 0
        for p, r in self.lengths[row]:
            middle, end = start + p, start + p + r
            allowed[start:end, start:middle] = True
            allowed[middle:end, middle:end] = torch.ones(r, r, dtype=torch.bool).tril()
            start = end
        return allowed

    def response_bias(self, prefix: int, response: int, like: torch.Tensor) -> torch.Tensor:
        """Additive mask [r, p + r] of one example's responses, made once and shared by all ticks and layers."""
        key = (prefix, response, like.dtype, like.device)
        if key not in self._biases:
            self._biases[key] = torch.full((response, prefix + response), float("-inf"), dtype=like.dtype,
                                           device=like.device).triu(prefix + 1)
        return self._biases[key]
