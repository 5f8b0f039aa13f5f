"""Offload activations of a tick's first layers to host memory, by Transformer Engine: --cpu-offloading-num-layers.

Transformer Engine's offload context expects one forward of a stack followed by its backward, and Megatron creates one
context per stack. Here a stack runs at several ticks before the first backward, so each tick that builds a graph gets
its own context, which lives as long as the graph.
"""
from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.transformer.transformer_block import TransformerBlock


def offloaded(block: TransformerBlock, layers: int) -> Callable[..., torch.Tensor]:
    """Return `block` as a stack whose first `layers` layers (fewer than all) save their activations in host memory.

    They are copied while later layers run and are copied back during their backward, on a separate stream.
    """
    from megatron.core.extensions.transformer_engine import get_cpu_offload_context

    def run(x: torch.Tensor, **options: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            block.offload_context, block.group_prefetch_offload_commit_async = get_cpu_offload_context(
                enabled=True, num_layers=layers, model_layers=len(block.layers), activation_offloading=True,
                weight_offloading=False, double_buffering=False, retain_pinned_cpu_buffers=False)
        try:
            out: torch.Tensor = block(x, **options)
        finally:
            block.offload_context, block.group_prefetch_offload_commit_async = nullcontext(), None
        return out
    return run


def keep_on_device(*shared: torch.Tensor) -> None:
    """Exclude these tensors, which all layers and ticks read, from offloading."""
    from transformer_engine.pytorch.cpu_offload import mark_not_offload

    mark_not_offload(*shared)
