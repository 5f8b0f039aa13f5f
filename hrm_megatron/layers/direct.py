"""Megatron's transformer layer with a direct forward: stock submodules without the checks between them.

The stock forwards of the layer and its attention check at each call for inference, cross attention, experts and other
features: a third of the host's calls in a tick. An HRM makes these choices at construction.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import make_viewless_tensor

Rotate = Callable[..., tuple[torch.Tensor, ...]]  # rotary embedding of queries and keys


def before_attention(layer: TransformerLayer, x: torch.Tensor, rotate: Rotate) -> tuple[torch.Tensor, ...]:
    """x [s, b, h] to rotated queries and keys, values and the gate, if any: [s, b, heads, d] each."""
    query, key, value, *gate = layer.self_attention.get_query_key_value_tensors(
        layer.input_layernorm(x), output_gate=layer.config.attention_output_gate)
    return *rotate(query, key), value, *gate


def behind_attention(layer: TransformerLayer, x: torch.Tensor, attended: torch.Tensor,
                     *gate: torch.Tensor) -> torch.Tensor:
    """Attention output [s, b, h] and gate, if any, to the layer's output [s, b, h]; x is the layer's input."""
    attention = layer.self_attention
    projected = attention.linear_proj(attention._apply_output_gate(attended, *gate) if gate else attended)
    add = layer.self_attn_bda(layer.training, layer.config.bias_dropout_fusion)
    normed = layer.pre_mlp_layernorm(x := add(projected, x, layer.hidden_dropout))
    out: torch.Tensor = layer.mlp_bda(layer.training, layer.config.bias_dropout_fusion)(
        layer.mlp(normed), x, layer.hidden_dropout)
    return out


class DirectLayer(TransformerLayer):  # type: ignore[misc]
    """A layer without recompute or offload of its own."""

    before: Callable[..., tuple[torch.Tensor, ...]] = staticmethod(before_attention)
    behind: Callable[..., torch.Tensor] = staticmethod(behind_attention)

    def forward(self, hidden_states: torch.Tensor, *, packed_seq_params: Any, **_: Any) -> tuple[torch.Tensor, None]:
        """Run the layer on [s/tp under SP, b, h]; the other arguments that Megatron passes are None for an HRM."""
        query, key, value, *gate = self.before(self, hidden_states, packed_seq_params.rotation)
        attended = self.self_attention.core_attention.attend_to_all(query, key, value, packed_seq_params)
        out = self.behind(self, hidden_states, attended, *gate)
        # As in Megatron: without gradients the residual sum is written in place into a view of a linear layer's output,
        # and a pipeline frees tensors it has sent.
        return make_viewless_tensor(out, out.requires_grad, keep_graph=True), None
