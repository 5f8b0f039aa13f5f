"""Layers whose element-wise operations torch.compile fuses into a few kernels: --compile-layers.

A layer is split at attention, whose sizes vary between micro-batches. The part before it and the part after it are one
compiled function each, matmuls included: calling one costs the host as much as several launches, and Megatron's
forward, split by attention inside three nested calls, would need seven. All layers of both stacks, ticks and
micro-batches share the compiled code. It is compiled at the first call with and the first call without a graph, and
again for an input with other strides.
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
        """Run the layer; where it adds gradients to `main_grad`, `GradientsAdded` on its output reports that."""
        out, _ = super().forward(hidden_states, **options)
        if self.config.gradient_accumulation_fusion and out.requires_grad:
            out = GradientsAdded.apply(out, *self.parameters())
        return out, None
