"""Layers whose element-wise work torch.compile joins into a few kernels: --compile-layers.

A layer is cut at attention, whose sizes differ from micro-batch to micro-batch. What lies before it and what lies
behind it is one compiled function each, with the matrix products inside: a call costs the host as much as several
launches, and the stock forward, which attention cuts in the middle of three calls inside each other, would make seven.
All layers of both stacks, ticks and micro-batches share the compiled code: it is made for a layer's first call with and
without a graph, and once more where an input lies in memory otherwise.
"""
from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer

from hrm_megatron.layers.functions import rotated
from hrm_megatron.parallel.main_grad import GradientsAdded


def before_attention(layer: TransformerLayer, x: torch.Tensor, cos: torch.Tensor,
                     sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """x [s, b, h] to queries and keys, both rotated, values and gate, [s, b, heads, d] each."""
    query, key, value, gate = layer.self_attention.get_query_key_value_tensors(
        layer.input_layernorm(x), output_gate=True)
    return rotated(query, cos, sin), rotated(key, cos, sin), value, gate


def behind_attention(layer: TransformerLayer, x: torch.Tensor, attended: torch.Tensor,
                     gate: torch.Tensor) -> torch.Tensor:
    """Attention's result [s, b, h] and its gate to the layer's output [s, b, h]; x is the layer's input."""
    attention = layer.self_attention
    projected = attention.linear_proj(attention._apply_output_gate(attended, gate))
    add = layer.self_attn_bda(layer.training, layer.config.bias_dropout_fusion)
    out: torch.Tensor = layer._forward_mlp(add(projected, x, layer.hidden_dropout))
    return out


_before, _behind = torch.compile(before_attention), torch.compile(behind_attention)


class CompiledLayer(TransformerLayer):  # type: ignore[misc]
    """Megatron's layer, compiled."""

    def forward(self, hidden_states: torch.Tensor, *, packed_seq_params: Any, **_: Any) -> tuple[torch.Tensor, None]:
        """Run the layer; where it adds gradients to `main_grad`, what follows its output says so for it.

        What else stock code hands over is None for an HRM.
        """
        rotation = packed_seq_params.rotation
        *attends, gate = _before(self, hidden_states, rotation.cos, rotation.sin)
        attended = self.self_attention.core_attention.attend_to_all(*attends, packed_seq_params)
        out = _behind(self, hidden_states, attended, gate)
        if self.config.gradient_accumulation_fusion and out.requires_grad:
            out = GradientsAdded.apply(out, *self.parameters())
        return out, None
