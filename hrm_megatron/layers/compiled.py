"""Layers whose element-wise work torch.compile joins into a few kernels: --compile-layers.

A layer is cut at attention, whose sizes differ from micro-batch to micro-batch. What lies before it and behind it is
compiled with the matrix products inside. All layers of both stacks, ticks and micro-batches share the compiled code:
it is made for a layer's first call with and without a graph, and once more where an input lies in memory otherwise.
"""
from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

_forward = torch.compile(TransformerLayer.forward)


class CompiledLayer(TransformerLayer):  # type: ignore[misc]
    """Megatron's layer, compiled."""

    def forward(self, *arguments: Any, **options: Any) -> Any:
        """Run the layer. Where it adds gradients to `main_grad`, its weights say so from now on and not from the
        backward on: a compiled backward cannot."""
        if self.config.gradient_accumulation_fusion and torch.is_grad_enabled():
            for weight in self.parameters():
                weight.grad_added_to_main_grad = True
        return _forward(self, *arguments, **options)
