"""The forward pass of an HRM over packed rows with pluggable matmuls: a caller can observe their inputs at every tick,
or replace their weights."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from hrm_megatron.attention.prefix_lm import PrefixSequences
from hrm_megatron.attention.rotary import Rotation
from hrm_megatron.config import Architecture
from hrm_megatron.data.batch import PackedBatch
from hrm_megatron.layers.functions import RMSNormFunction, SwiGLUFunction, gated, run
from hrm_megatron.model.ticks import unroll

Weights = Mapping[str, torch.Tensor]  # fp32 [out, in], by transformers' names
Matmul = Callable[[str, torch.Tensor], torch.Tensor]  # name of a weight, x [..., in] -> x times it, [..., out]
Z_L, EMBEDDING, HEAD = "model.z_L_init", "model.embed_tokens.weight", "lm_head.weight"


def layer_weights(stack: str, layer: int) -> dict[str, str]:
    """Return the names of a layer's matrices, in the order of use."""
    place = f"model.{stack}_module.layers.{layer}."
    return {name: f"{place}{name}.weight" for name in ("attn.gqkv_proj", "attn.o_proj", "mlp.gate_up_proj",
                                                       "mlp.down_proj")}


def matmul_with(weights: Weights) -> Matmul:
    return lambda name, x: F.linear(x, weights[name])


@dataclass(frozen=True)
class Rows:
    """Packed rows ready for the forward pass: mask bool [b, 1, s, s], and the indices of non-padding positions in the
    flattened [s, b] order."""

    batch: PackedBatch
    mask: torch.Tensor
    rotation: Rotation
    positions: torch.Tensor

    @classmethod
    def of(cls, batch: PackedBatch, architecture: Architecture) -> Rows:
        rotation = Rotation.of(batch.position_ids, architecture.head_dim, architecture.rope_theta)
        sequences = PrefixSequences(batch.lengths, rotation, batch.row_tokens)
        # Padding attends to itself: a row of the mask without any key gives NaN.
        mask = torch.stack([sequences.dense_mask(row) | torch.eye(batch.row_tokens, dtype=torch.bool)
                            for row in range(len(batch.lengths))])
        filled = torch.tensor([sum(p + r for p, r in row) for row in batch.lengths])
        positions = (torch.arange(batch.row_tokens)[:, None] < filled).flatten().nonzero().squeeze(1)
        return cls(batch, mask[:, None].to(batch.tokens.device), rotation, positions.to(batch.tokens.device))


def batches(rows: Iterable[dict[str, torch.Tensor]], architecture: Architecture, rows_per_batch: int,
            device: torch.device) -> Iterator[Rows]:
    """Stack `assemble_row` results into batches."""
    gathered: list[dict[str, torch.Tensor]] = []
    for row in rows:
        gathered.append(row)
        if len(gathered) == rows_per_batch:
            yield _stacked(gathered, architecture, device)
            gathered = []
    if gathered:
        yield _stacked(gathered, architecture, device)


def _stacked(rows: list[dict[str, torch.Tensor]], architecture: Architecture, device: torch.device) -> Rows:
    stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    return Rows.of(PackedBatch.from_rows(stacked).to(device), architecture)


class Recurrence:
    """All ticks of an HRM; `weights`: embedding, initial z_L and, unless `matmul` is given, all matrices."""

    def __init__(self, architecture: Architecture, weights: Weights, matmul: Matmul | None = None) -> None:
        self.architecture, self.weights = architecture, weights
        self.matmul = matmul or matmul_with(weights)

    def states(self, rows: Rows) -> torch.Tensor:
        """Run all ticks and return the last z_H, [s, b, h]."""
        a = self.architecture
        x = F.embedding(rows.batch.tokens.t(), self.weights[EMBEDDING]) * a.embedding_scale
        states = {"H": x, "L": self.weights[Z_L].expand_as(x)}
        for tick in unroll(a.h_cycles, a.l_cycles):
            states[tick.stack] = self._stack(tick.stack, states["L"] + states["H"], rows)
        return states["H"]

    def label_logits(self, z_h: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Return logits at labelled positions, [n, v], with head rows of no token, as in the training loss."""
        return self.matmul(HEAD, z_h.flatten(0, 1)[rows.batch.label_index])

    def _stack(self, stack: str, x: torch.Tensor, rows: Rows) -> torch.Tensor:
        for layer in range(self.architecture.num_layers):
            names = layer_weights(stack, layer)
            attended = self._attention(self.matmul(names["attn.gqkv_proj"], self._norm(x)), rows)
            x = x + self.matmul(names["attn.o_proj"], attended)
            activated = run(SwiGLUFunction, self.matmul(names["mlp.gate_up_proj"], self._norm(x)))
            x = x + self.matmul(names["mlp.down_proj"], activated)
        return self._norm(x)

    def _norm(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = run(RMSNormFunction, x, self.architecture.norm_epsilon)
        return out

    def _attention(self, gqkv: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Return gated attention [s, b, h] of [gate | query | key | value], each over all heads."""
        gate, *qkv = gqkv.chunk(4, -1)
        query, key, value = (part.unflatten(-1, (self.architecture.num_attention_heads, -1)) for part in qkv)
        query, key = rows.rotation(query, key)
        query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=rows.mask)  # [b, heads, s, d]
        return gated(found.permute(2, 0, 1, 3).flatten(2), gate)
