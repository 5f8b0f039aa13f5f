"""The weights of an HRM for generation: one matrix per matmul in its fastest layout, without vocabulary padding."""
from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from hrm_megatron.config import Architecture
from hrm_megatron.convert.table import table
from hrm_megatron.generate.matrix import Matrix, matrix_of

MATRICES = {"gqkv_proj": "gqkv", "o_proj": "attention_out", "gate_up_proj": "gate_up", "down_proj": "mlp_out"}


@dataclass(frozen=True)
class LayerWeights:
    """The matrices [in, out] of a layer: gqkv is [gate | query | key | value] over all heads, gate_up [gate | up]."""

    gqkv: Matrix  # [h, 4 h]
    attention_out: Matrix  # [h, h]
    gate_up: Matrix  # [h, 2 ffn]
    mlp_out: Matrix  # [ffn, h]


@dataclass(frozen=True)
class Weights:
    """All of a model's weights on one device and in one dtype."""

    architecture: Architecture
    embedding: torch.Tensor  # [v, h]
    head: Matrix  # [h, v], real tokens only: padding cannot be chosen
    z_l: torch.Tensor | None  # [h]; None where no tick reads it
    stacks: dict[str, list[LayerWeights]]  # by the name of the stack, "H" or "L"

    @property
    def matrices(self) -> list[Matrix]:
        """All matrices, each once."""
        return [*(matrix for stack in self.stacks.values() for layer in stack for matrix in vars(layer).values()),
                self.head]

    @property
    def tick_bytes(self) -> int:
        """Bytes of weights that one decoded token reads over all ticks, which bound the speed of a single answer."""
        per_stack = sum(matrix.nbytes for layer in self.stacks["L"] for matrix in vars(layer).values())
        return per_stack * self.architecture.num_ticks + self.head.nbytes


@torch.no_grad()
def take_weights(architecture: Architecture, tensors: Iterable[tuple[str, torch.Tensor]],
                 vocab_size: int | None = None, dtype: torch.dtype = torch.float32,
                 device: torch.device | str = "cpu") -> Weights:
    """Return the weights from unsharded tensors with Megatron's names, one at a time; `vocab_size` None: the
    architecture's."""
    entries = {entry.megatron: entry for entry in table(architecture)}
    layers: dict[tuple[str, int], dict[str, Matrix]] = {}
    others: dict[str, torch.Tensor] = {}
    for name, tensor in tensors:
        entry = entries.pop(name)
        whole = entry.from_megatron(tensor.detach()).to(device, dtype)
        if found := re.fullmatch(r"([hl])_stack\.layers\.(\d+)\..*", entry.megatron):
            part = entry.native.removesuffix(".weight").rpartition(".")[2]
            layers.setdefault((found[1].upper(), int(found[2])), {})[MATRICES[part]] = matrix_of(whole)
        else:
            others[entry.native] = whole
    assert not entries, f"weights that are not there: {sorted(entries)}"
    return Weights(
        architecture, others["embed_tokens.embedding_weight"],
        matrix_of(others["lm_head.weight"][:vocab_size or architecture.vocab_size]), others.get("model.zL_init"),
        {stack: [LayerWeights(**layers[stack, layer]) for layer in range(architecture.num_layers)]
         for stack in architecture.kind.stacks})
