"""Layers whose element-wise work torch.compile joins into a few kernels: --compile-layers.

A layer is cut at attention, whose sizes differ from micro-batch to micro-batch. What lies before it and behind it is
compiled with the matrix products inside. All layers of both stacks, ticks and micro-batches share the compiled code:
it is made for a layer's first call with and without a graph, and once more where an input lies in memory otherwise.
"""
from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from hrm_megatron.parallel.main_grad import GradientsAdded

_forward = torch.compile(TransformerLayer.forward)


class CompiledLayer(TransformerLayer):  # type: ignore[misc]
    """Megatron's layer, compiled."""

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Run the layer; where it adds gradients to `main_grad`, what follows its output says so for it."""
        out, context = _forward(self, *arguments, **options)
        if self.config.gradient_accumulation_fusion and out.requires_grad:
            out = GradientsAdded.apply(out, *self.parameters())
        return out, context
