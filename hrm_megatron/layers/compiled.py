"""Layers whose element-wise work torch.compile joins into a few kernels: --compile-layers.

A layer is cut at attention, whose sizes differ from micro-batch to micro-batch. What lies before it and what lies
behind it is one compiled function each, with the matmuls inside: a call costs the host as much as several
launches, and the stock forward, which attention cuts in the middle of three calls inside each other, would make seven.
All layers of both stacks, ticks and micro-batches share the compiled code: it is made for a layer's first call with and
without a graph, and once more where an input lies in memory otherwise.
"""
from __future__ import annotations

from typing import Any

import torch

from hrm_megatron.layers.direct import DirectLayer, before_attention, behind_attention
from hrm_megatron.parallel.main_grad import GradientsAdded


class CompiledLayer(DirectLayer):
    """Megatron's layer, compiled."""

    before = staticmethod(torch.compile(before_attention))
    behind = staticmethod(torch.compile(behind_attention))

    def forward(self, hidden_states: torch.Tensor, **options: Any) -> tuple[torch.Tensor, None]:
        """Run the layer; where it adds gradients to `main_grad`, what follows its output says so for it."""
        out, _ = super().forward(hidden_states, **options)
        if self.config.gradient_accumulation_fusion and out.requires_grad:
            out = GradientsAdded.apply(out, *self.parameters())
        return out, None
