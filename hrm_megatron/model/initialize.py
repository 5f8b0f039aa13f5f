"""Initial weights that depend on (seed, parameter name) only: the same model in every parallel layout."""
from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import torch

from hrm_megatron.config import Architecture

# HRM-Text draws fmod(N(0,1), 3) and multiplies by this, which restores unit variance.
TRUNCATION = 3.0
TRUNCATION_SCALE = 1.014762601732121


def std_of(name: str, architecture: Architecture) -> float:
    """Return the standard deviation of the parameter with this Megatron name."""
    if name.endswith("linear_proj.weight"):
        return architecture.attention_output_std
    if name.endswith("linear_fc2.weight"):
        return architecture.mlp_output_std
    return architecture.input_std


def draw(seed: int, name: str, shape: Iterable[int]) -> torch.Tensor:
    """Draw the full (unsharded) tensor called `name` with unit variance, fp32 on the CPU."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.randn(tuple(shape), generator=generator).fmod_(TRUNCATION).mul_(TRUNCATION_SCALE)


def shard(full: torch.Tensor, weight: torch.Tensor, tp_rank: int, tp_size: int) -> torch.Tensor:
    """Return this tensor-parallel rank's shard, by the attributes that Megatron's linear layers set on `weight`.

    A partition_stride of 2 (SwiGLU) means that every rank holds a shard of each half.
    """
    if tp_size == 1 or not getattr(weight, "tensor_model_parallel", False):
        return full
    dim, stride = weight.partition_dim, weight.partition_stride  # type: ignore[attr-defined]
    return torch.cat(full.chunk(tp_size * stride, dim)[tp_rank::tp_size], dim)


@torch.no_grad()
def initialize(named: Iterable[tuple[str, torch.Tensor]], architecture: Architecture, seed: int, tp_rank: int,
               tp_size: int) -> None:
    """Initialize parameters, given with their global names (layers numbered over all pipeline stages)."""
    for name, weight in named:
        shape = list(weight.shape)
        if getattr(weight, "tensor_model_parallel", False):
            shape[weight.partition_dim] *= tp_size  # type: ignore[attr-defined]
        full = draw(seed, name, shape) * std_of(name, architecture)
        part = shard(full, weight, tp_rank, tp_size)
        weight.copy_(part)
        if hasattr(weight, "get_high_precision_init_val"):  # of FP8: initializes the master weight
            weight.get_high_precision_init_val().copy_(part)


@torch.no_grad()
def leave_to_checkpoint(tensors: Iterable[torch.Tensor]) -> None:
    """Fill with NaN the tensors that a checkpoint will load, which is faster than drawing them: one that the checkpoint
    lacks makes the first loss NaN."""
    for tensor in tensors:
        tensor.fill_(math.nan)
