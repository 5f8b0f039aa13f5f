"""Megatron's layer from end to end: its parts are stock, and between them nothing is asked.

Stock forwards of a layer and of its attention cover inference, cross attention, experts and what else they can do, and
ask at each call whether that is wanted: a third of the host's calls in a tick. An HRM decides when it is built.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import make_viewless_tensor

Rotate = Callable[..., tuple[torch.Tensor, ...]]  # queries and keys to their positions


def before_attention(layer: TransformerLayer, x: torch.Tensor, rotate: Rotate) -> tuple[torch.Tensor, ...]:
    """x [s, b, h] to queries and keys, both rotated, values and, if there is one, gate: [s, b, heads, d] each."""
    query, key, value, *gate = layer.self_attention.get_query_key_value_tensors(
        layer.input_layernorm(x), output_gate=layer.config.attention_output_gate)
    return *rotate(query, key), value, *gate


def behind_attention(layer: TransformerLayer, x: torch.Tensor, attended: torch.Tensor,
                     *gate: torch.Tensor) -> torch.Tensor:
    """Attention's result [s, b, h] and its gate, if any, to the layer's output [s, b, h]; x is the layer's input."""
    attention = layer.self_attention
    projected = attention.linear_proj(attention._apply_output_gate(attended, *gate) if gate else attended)
    add = layer.self_attn_bda(layer.training, layer.config.bias_dropout_fusion)
    normed = layer.pre_mlp_layernorm(x := add(projected, x, layer.hidden_dropout))
    out: torch.Tensor = layer.mlp_bda(layer.training, layer.config.bias_dropout_fusion)(
        layer.mlp(normed), x, layer.hidden_dropout)
    return out


class DirectLayer(TransformerLayer):  # type: ignore[misc]
    """A layer of which nothing is recomputed or offloaded by itself."""

    before: Callable[..., tuple[torch.Tensor, ...]] = staticmethod(before_attention)
    behind: Callable[..., torch.Tensor] = staticmethod(behind_attention)

    def forward(self, hidden_states: torch.Tensor, *, packed_seq_params: Any, **_: Any) -> tuple[torch.Tensor, None]:
        """Run the layer on [s/tp under SP, b, h]; what else stock code hands over is None for an HRM."""
        query, key, value, *gate = self.before(self, hidden_states, packed_seq_params.rotation)
        attended = self.self_attention.core_attention.attend_to_all(query, key, value, packed_seq_params)
        out = self.behind(self, hidden_states, attended, *gate)
        # As stock: without gradients the residual sum is written into what a linear layer views, and a pipeline frees
        # what it has sent.
        return make_viewless_tensor(out, out.requires_grad, keep_graph=True), None
