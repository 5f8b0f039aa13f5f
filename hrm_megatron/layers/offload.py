"""Activations of a tick's first layers in the host's memory, by Transformer Engine: --cpu-offloading-num-layers.

Transformer Engine's context follows one forward of a stack and then its backward, and Megatron gives each stack one
context for good. Here a stack runs at several ticks before the first of their backwards, so each tick that builds a
graph gets a context of its own, which lives as long as the graph.
"""
from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from megatron.core.transformer.transformer_block import TransformerBlock


def offloaded(block: TransformerBlock, layers: int) -> Callable[..., torch.Tensor]:
    """Make a stack out of `block` whose first `layers` layers, not all, keep for backward what is in host memory.

    It is copied while later layers run and comes back during their backward, on a stream of its own.
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
    """Say that these, which all layers and ticks read, are never to be copied."""
    from transformer_engine.pytorch.cpu_offload import mark_not_offload

    mark_not_offload(*shared)
