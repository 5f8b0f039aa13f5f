"""LoRA adapter of a linear layer: a low-rank path beside a frozen weight, sharded like the weight."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

from hrm_megatron.config import LoRA
from hrm_megatron.layers.linear import linear

if TYPE_CHECKING:
    from hrm_megatron.layers.linear import OwnLinear

HALVES = 2  # partition_stride of a weight of which each rank holds a shard of both halves (SwiGLU)


def merged(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """Return W + scale B A in fp32; the factors are fp32."""
    return weight.float() + (b * scale) @ a


class Adapter(torch.nn.Module):
    """scale B A x, with A [r, k] and B [n, r] beside a weight [n, k]. The factor that has the weight's tensor-parallel
    axis is sharded too, A [r, k/tp] or B [n/tp, r]; the other is replicated.

    Ranks exchange A x, [s, b, r]. Under sequence parallelism a replicated factor sees only this rank's positions, and
    Megatron all-reduces its gradient like that of a norm.
    """

    def __init__(self, layer: OwnLinear, lora: LoRA) -> None:
        super().__init__()
        weight: Any = layer.weight
        n, k = weight.shape
        self.A = torch.nn.Parameter(weight.new_empty(lora.rank, k))
        self.B = torch.nn.Parameter(weight.new_zeros(n, lora.rank))
        self.scale, self.fusion, self.group = lora.scale, layer.gradient_accumulation_fusion, layer.tp_group
        self.alone, self.sequence_parallel = layer.tp_group.size() == 1, layer.sequence_parallel
        self.column = weight.partition_dim == 0
        self.halves = self.column and weight.partition_stride == HALVES
        cut, whole = (self.B, self.A) if self.column else (self.A, self.B)
        set_tensor_model_parallel_attributes(cut, True, weight.partition_dim, weight.partition_stride)
        whole.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [s/tp under SP, b, k] to [s, b, n/tp], or [s, b, k/tp] to [s/tp under SP, b, n]."""
        narrow = linear(x, self.A, self.fusion)
        if not self.alone:
            if self.column:
                share = (gather_from_sequence_parallel_region if self.sequence_parallel else
                         copy_to_tensor_model_parallel_region)
            else:
                share = (reduce_scatter_to_sequence_parallel_region if self.sequence_parallel else
                         reduce_from_tensor_model_parallel_region)
            narrow = share(narrow, group=self.group)
        return linear(narrow * self.scale, self.B, self.fusion)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Return both factors as sharded tensors for Megatron's checkpoints."""
        group = metadata["dp_cp_group"]
        stored: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {"B": 0} if self.column else {"A": 1}, sharded_offsets,
            tp_group=self.group, dp_cp_group=group)
        if self.halves:
            stored[f"{prefix}B"] = apply_swiglu_sharded_factory(
                stored[f"{prefix}B"], sharded_offsets, metadata.get("singleton_local_shards", False),
                tp_group=self.group, dp_group=group)
        return stored
