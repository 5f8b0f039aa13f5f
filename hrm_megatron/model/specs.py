"""Megatron-Core specs of both stacks: stock layers with the weightless norm and PrefixLM attention."""
from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from hrm_megatron.attention.core import core_attention
from hrm_megatron.layers.compiled import CompiledLayer
from hrm_megatron.layers.direct import DirectLayer
from hrm_megatron.layers.functions import RMSNormFunction, SwiGLUFunction, rms_norm, run, swiglu
from hrm_megatron.layers.gated_recompute import GatedAttention, RecomputedSwiGLU, RecomputingMLP
from hrm_megatron.layers.linear import OwnLinearProvider
from hrm_megatron.transformer_config import HRMConfig


class WeightlessRMSNorm(torch.nn.Module):
    """RMSNorm without a weight: nothing to train, to save or to reduce under sequence parallelism."""

    def __init__(self, config: HRMConfig, hidden_size: int | None = None, eps: float = 1e-6, **_: Any) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return rms_norm(x, self.eps)
        normed: torch.Tensor = run(RMSNormFunction, x, self.eps)
        return normed


class SwiGLU(torch.nn.Module):
    """The MLP's activation, [s, b, 2 * ffn/tp] to [s, b, ffn/tp], for when Megatron's fused one is not used."""

    def __init__(self, config: HRMConfig) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return swiglu(x)
        activated: torch.Tensor = run(SwiGLUFunction, x)
        return activated


def linear_layers(config: HRMConfig) -> BackendSpecProvider:
    """Return the provider of linear layers for `config.transformer_impl`."""
    if config.transformer_impl == "local":
        return OwnLinearProvider()
    from hrm_megatron.layers.te_linear import TickSpecProvider  # needs Transformer Engine

    return TickSpecProvider()


def add_then_norm(norm: WeightlessRMSNorm) -> Callable[..., Any]:
    """Return the bias-dropout-add of a post-norm layer: x = norm(x + f(x))."""
    def make(training: bool, fused: bool) -> Callable[..., torch.Tensor]:
        add = get_bias_dropout_add(training, fused)
        return lambda x_with_bias, residual, dropout: norm(add(x_with_bias, residual, dropout))
    return make


def stack_spec(config: HRMConfig, norm_placement: str, backend: BackendSpecProvider) -> TransformerBlockSubmodules:
    """Return the spec of one stack: this pipeline stage's layers and, for pre-norm, the norm at the stack's exit.

    `backend` provides the linear layers.
    """
    if norm_placement == "pre":
        norm, bias_dropout_add, exit_norm = WeightlessRMSNorm, get_bias_dropout_add, WeightlessRMSNorm
    else:
        norm, exit_norm = IdentityOp, None
        bias_dropout_add = add_then_norm(WeightlessRMSNorm(config, eps=config.layernorm_epsilon))
    stock = (config.recompute_granularity or config.recompute_gated_act or config.cpu_offloading
             or config.mlp_chunks_for_training > 1)
    layer_class = CompiledLayer if config.compile_layers else TransformerLayer if stock else DirectLayer
    mlp_class, activation = (RecomputingMLP, RecomputedSwiGLU) if config.recompute_gated_act else (MLP, SwiGLU)
    layer = ModuleSpec(module=layer_class, submodules=TransformerLayerSubmodules(
        input_layernorm=norm,
        self_attention=ModuleSpec(
            module=GatedAttention if config.attention_output_gate else SelfAttention,
            params={"attn_mask_type": AttnMaskType.arbitrary},
            submodules=SelfAttentionSubmodules(
                linear_qkv=backend.column_parallel_linear(),
                core_attention=core_attention(config.attention_kernel, config.params_dtype, config.kv_channels),
                linear_proj=backend.row_parallel_linear())),
        self_attn_bda=bias_dropout_add,
        pre_mlp_layernorm=norm,
        mlp=partial(mlp_class.as_mlp_submodule, ffn_hidden_size=config.ffn_hidden_size, submodules=MLPSubmodules(
            linear_fc1=backend.column_parallel_linear(), activation_func=activation,
            linear_fc2=backend.row_parallel_linear())),
        mlp_bda=bias_dropout_add))
    return TransformerBlockSubmodules([layer] * get_num_layers_to_build(config), layer_norm=exit_norm)
