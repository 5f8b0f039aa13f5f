"""Names and layouts of an HRM's tensors in Megatron, HRM-Text and transformers: one table for all directions.

All tensors here are unsharded. HRM-Text ("native") and transformers ("hf") differ only in names; Megatron stores the
projection of gated attention per head.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from hrm_megatron.config import Architecture, ConfigError

Side = Literal["megatron", "native", "hf"]
REFERENCE_ORDER = ("gate", "query", "key", "value")  # each block over all heads
PER_HEAD_ORDER = ("query", "gate", "key", "value")  # SelfAttention with attention_output_gate, inside each head


@dataclass(frozen=True)
class Rename:
    """One tensor: its names, its shape (on all sides, unless `foreign_shape` differs), and whether it is trained."""

    megatron: str
    native: str
    hf: str
    shape: tuple[int, ...]
    trained: bool = True

    def name(self, side: Side) -> str:
        return {"megatron": self.megatron, "native": self.native, "hf": self.hf}[side]

    @property
    def foreign_shape(self) -> tuple[int, ...]:
        """The shape in HRM-Text's and transformers' layout."""
        return self.shape

    def to_megatron(self, tensor: torch.Tensor) -> torch.Tensor:
        """Convert from HRM-Text's layout to Megatron's."""
        return tensor

    def from_megatron(self, tensor: torch.Tensor) -> torch.Tensor:
        """Convert from Megatron's layout to HRM-Text's."""
        return tensor


@dataclass(frozen=True)
class GatedQKV(Rename):
    """HRM-Text: rows [gate | query | key | value] over all heads. Megatron: [query, gate, key, value] per head."""

    heads: int = 1

    def to_megatron(self, tensor: torch.Tensor) -> torch.Tensor:
        order = [REFERENCE_ORDER.index(name) for name in PER_HEAD_ORDER]
        return tensor.view(4, self.heads, -1, tensor.shape[-1])[order].transpose(0, 1).reshape(tensor.shape)

    def from_megatron(self, tensor: torch.Tensor) -> torch.Tensor:
        order = [PER_HEAD_ORDER.index(name) for name in REFERENCE_ORDER]
        return tensor.view(self.heads, 4, -1, tensor.shape[-1]).transpose(0, 1)[order].reshape(tensor.shape)


@dataclass(frozen=True)
class UngatedQKV(Rename):
    """Megatron: [query, key, value] per head. HRM-Text and transformers always have a gate, so an export prepends gate
    rows of zeros.

    sigmoid(0) is exactly 1/2, so with a doubled output projection (`Doubled`) the function is the same.
    """

    heads: int = 1

    @property
    def foreign_shape(self) -> tuple[int, ...]:
        return (self.shape[0] // 3 * 4, *self.shape[1:])

    def to_megatron(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.view(4, self.heads, -1, tensor.shape[-1])[1:].transpose(0, 1).reshape(self.shape)

    def from_megatron(self, tensor: torch.Tensor) -> torch.Tensor:
        blocks = tensor.view(self.heads, 3, -1, tensor.shape[-1]).transpose(0, 1)
        return torch.cat((torch.zeros_like(blocks[:1]), blocks)).reshape(self.foreign_shape)


@dataclass(frozen=True)
class Doubled(Rename):
    """The output projection of ungated attention, doubled in HRM-Text and transformers: see `UngatedQKV`."""

    def to_megatron(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor / 2

    def from_megatron(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor * 2


def table(architecture: Architecture) -> list[Rename]:
    """Return all tensors of this architecture, in the order in which HRM-Text registers them."""
    h, ffn, vocab = architecture.hidden_size, architecture.ffn_hidden_size, architecture.padded_vocab_size
    heads, (qkv, _) = architecture.num_attention_heads, architecture.linear_shapes["linear_qkv"]
    kind = architecture.kind
    of_qkv: type[GatedQKV | UngatedQKV] = GatedQKV if architecture.gated else UngatedQKV
    of_output = Rename if architecture.gated else Doubled
    entries = [Rename("zL_init", "model.zL_init", "model.z_L_init", (h,), trained=False)] * kind.starts_from_z_l
    for stack in kind.stacks:
        for i in range(architecture.num_layers):
            megatron, native, hf = (f"{stack.lower()}_stack.layers.{i}.",
                                    f"{kind.native_layers.format(stack)}{i}.", f"model.{stack}_module.layers.{i}.")
            entries += [
                of_qkv(f"{megatron}self_attention.linear_qkv.weight", f"{native}attn.gqkv_proj.weight",
                       f"{hf}attn.gqkv_proj.weight", (qkv, h), heads=heads),
                of_output(f"{megatron}self_attention.linear_proj.weight", f"{native}attn.o_proj.weight",
                          f"{hf}attn.o_proj.weight", (h, h)),
                Rename(f"{megatron}mlp.linear_fc1.weight", f"{native}mlp.gate_up_proj.weight",
                       f"{hf}mlp.gate_up_proj.weight", (2 * ffn, h)),  # [gate | up] on all sides
                Rename(f"{megatron}mlp.linear_fc2.weight", f"{native}mlp.down_proj.weight",
                       f"{hf}mlp.down_proj.weight", (h, ffn)),
            ]
    return entries + [
        Rename("embedding.word_embeddings.weight", "embed_tokens.embedding_weight", "model.embed_tokens.weight",
               (vocab, h)),
        Rename("output_layer.weight", "lm_head.weight", "lm_head.weight", (vocab, h)),
    ]


def is_embedding(entry: Rename) -> bool:
    """Return whether this is the embedding, whose updates are counted separately."""
    return entry.native == "embed_tokens.embedding_weight"


def check(place: object, side: Side, entries: Iterable[Rename], found: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse tensors `found` (name -> shape) at `place` that are not exactly those of the table."""
    expected = {entry.name(side): entry.shape if side == "megatron" else entry.foreign_shape for entry in entries}
    for complaint, names in (("missing", expected.keys() - found.keys()),
                             ("left over", found.keys() - expected.keys())):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ConfigError(f"{place}: tensors {complaint}: {', '.join(sorted(names)[:3])}{more}; it is not the HRM "
                              "that its settings describe")
    for name, shape in expected.items():
        if tuple(found[name]) != shape:
            raise ConfigError(f"{place}: {name} has shape {list(found[name])}, its settings ask for {list(shape)}; "
                              "the folder's settings and tensors belong to different models")
