"""The HRM's TransformerConfig: Megatron's, with the architecture beside it."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from hrm_megatron.config import Architecture
from hrm_megatron.model.kernel_choice import AUTO


@dataclass
class HRMConfig(TransformerConfig):  # type: ignore[misc]
    """A TransformerConfig for both stacks; `num_layers` counts layers per stack.

    The first `recompute_ticks` ticks with gradient keep only their input; `compile_layers` asks for model/compiled.py,
    `recompute_products` for the second half of model/products.py.
    """

    architecture: Architecture | None = None
    attention_kernel: str = AUTO
    recompute_ticks: int = 0
    compile_layers: bool = False
    recompute_products: bool = False

    @property
    def arch(self) -> Architecture:
        assert self.architecture is not None
        return self.architecture


# What every HRM is, in Megatron's words: gate per head, SwiGLU, no biases, no dropout, own initialization,
# checkpoint keys per layer (stacked keys cannot be shared between chunks of a pipeline).
HRM_SETTINGS: dict[str, Any] = dict(
    attention_output_gate=True, gated_linear_unit=True, add_bias_linear=False, add_qkv_bias=False,
    hidden_dropout=0.0, attention_dropout=0.0, normalization="RMSNorm", perform_initialization=False,
    bias_dropout_fusion=False, apply_rope_fusion=False, hetereogenous_dist_checkpoint=True,
)


def swiglu_settings(own: bool = False) -> dict[str, bool]:
    """Pick the activation: Megatron's compiled kernel on a GPU, ours elsewhere and where it must be ours (the flag's
    name is Megatron's)."""
    fused = torch.cuda.is_available() and not own
    return dict(bias_activation_fusion=fused, use_te_activation_func=not fused)


def hrm_config(architecture: Architecture, **overrides: Any) -> HRMConfig:
    """Build the config of `architecture`; `overrides` are TransformerConfig fields (parallel sizes, dtypes ...)."""
    settings: dict[str, Any] = dict(
        num_layers=architecture.num_layers, hidden_size=architecture.hidden_size,
        num_attention_heads=architecture.num_attention_heads, ffn_hidden_size=architecture.ffn_hidden_size,
        layernorm_epsilon=architecture.norm_epsilon, activation_func=F.silu, architecture=architecture,
        transformer_impl="local", params_dtype=torch.float32,
        use_cpu_initialization=not torch.cuda.is_available(), **HRM_SETTINGS,
        **swiglu_settings(overrides.get("compile_layers", False) or overrides.get("recompute_products", False)))
    return HRMConfig(**(settings | overrides))
