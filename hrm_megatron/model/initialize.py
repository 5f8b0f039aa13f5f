"""Initial weights from (seed, parameter name) alone: the same model in every parallel layout."""
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
    """Standard deviation of the parameter with this Megatron name."""
    if name.endswith("linear_proj.weight"):
        return architecture.attention_output_std
    if name.endswith("linear_fc2.weight"):
        return architecture.mlp_output_std
    return architecture.input_std


def draw(seed: int, name: str, shape: Iterable[int]) -> torch.Tensor:
    """Draw the full tensor called `name` with unit variance, fp32 on the CPU."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
    return torch.randn(tuple(shape), generator=generator).fmod_(TRUNCATION).mul_(TRUNCATION_SCALE)


def shard(full: torch.Tensor, weight: torch.Tensor, tp_rank: int, tp_size: int) -> torch.Tensor:
    """Return this tensor-parallel rank's slice, by the attributes that Megatron's linears put on `weight`.

    A partition_stride of 2 (SwiGLU) means that every rank holds a piece of each half.
    """
    if tp_size == 1 or not getattr(weight, "tensor_model_parallel", False):
        return full
    dim, stride = weight.partition_dim, weight.partition_stride  # type: ignore[attr-defined]
    return torch.cat(full.chunk(tp_size * stride, dim)[tp_rank::tp_size], dim)


@torch.no_grad()
def initialize(named: Iterable[tuple[str, torch.Tensor]], architecture: Architecture, seed: int, tp_rank: int,
               tp_size: int) -> None:
    """Fill parameters given with their global names (layers counted over all pipeline stages)."""
    for name, weight in named:
        shape = list(weight.shape)
        if getattr(weight, "tensor_model_parallel", False):
            shape[weight.partition_dim] *= tp_size  # type: ignore[attr-defined]
        full = draw(seed, name, shape) * std_of(name, architecture)
        part = shard(full, weight, tp_rank, tp_size)
        weight.copy_(part)
        if hasattr(weight, "get_high_precision_init_val"):  # an FP8 parameter: what its master weight begins with
            weight.get_high_precision_init_val().copy_(part)


@torch.no_grad()
def leave_to_checkpoint(tensors: Iterable[torch.Tensor]) -> None:
    """Fill tensors with NaN that a checkpoint is to fill, in less time than it takes to draw them: what it leaves out
    makes the first loss NaN."""
    for tensor in tensors:
        tensor.fill_(math.nan)
