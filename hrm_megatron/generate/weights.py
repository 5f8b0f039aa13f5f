"""The weights of an HRM as generation reads them: one matrix per matmul, transposed for it, no padded vocabulary."""
from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from hrm_megatron.config import Architecture
from hrm_megatron.convert.table import table

MATRICES = {"gqkv_proj": "gqkv", "o_proj": "attention_out", "gate_up_proj": "gate_up", "down_proj": "mlp_out"}


@dataclass(frozen=True)
class LayerWeights:
    """The matrices [in, out] of a layer: gqkv is [gate | query | key | value] over all heads, gate_up [gate | up]."""

    gqkv: torch.Tensor  # [h, 4 h]
    attention_out: torch.Tensor  # [h, h]
    gate_up: torch.Tensor  # [h, 2 ffn]
    mlp_out: torch.Tensor  # [ffn, h]


@dataclass(frozen=True)
class Weights:
    """All of a model's weights on one device and in one dtype."""

    architecture: Architecture
    embedding: torch.Tensor  # [v, h]
    head: torch.Tensor  # [h, v], of real tokens alone: no other can be chosen
    z_l: torch.Tensor  # [h]
    stacks: dict[str, list[LayerWeights]]  # "H" and "L"

    @property
    def tick_bytes(self) -> int:
        """Bytes of weights that one decoded token reads, every tick counted: what bounds the speed of one answer."""
        a = self.architecture
        per_stack = sum(matrix.nbytes for matrix in vars(self.stacks["H"][0]).values()) * a.num_layers
        return per_stack * a.h_cycles * (a.l_cycles + 1) + self.head.nbytes


@torch.no_grad()
def take_weights(architecture: Architecture, tensors: Iterable[tuple[str, torch.Tensor]],
                 vocab_size: int | None = None, dtype: torch.dtype = torch.float32,
                 device: torch.device | str = "cpu") -> Weights:
    """Take full tensors under Megatron's names, one at a time; `vocab_size` None: the architecture's.

    A matrix is stored as [in, out] because a matmul of few rows is faster so: on a Xeon with AVX-512, 8 rows by
    512 x 2048 in fp32 take 0.24 ms instead of 0.51, and a single row takes the same.
    """
    entries = {entry.megatron: entry for entry in table(architecture)}
    layers: dict[tuple[str, int], dict[str, torch.Tensor]] = {}
    others: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        entry = entries.pop(name)
        whole = entry.from_megatron(tensor.detach()).to(device, dtype)
        if found := re.fullmatch(r"model\.([HL])_level\.core\.layers\.(\d+)\.\w+\.(\w+)\.weight", entry.native):
            layers.setdefault((found[1], int(found[2])), {})[MATRICES[found[3]]] = whole.t().contiguous()
        else:
            others[entry.native] = whole
    assert not entries, f"weights that are not there: {sorted(entries)}"
    return Weights(
        architecture, others["embed_tokens.embedding_weight"],
        others["lm_head.weight"][:vocab_size or architecture.vocab_size].t().contiguous(), others["model.zL_init"],
        {stack: [LayerWeights(**layers[stack, layer]) for layer in range(architecture.num_layers)] for stack in "HL"})
