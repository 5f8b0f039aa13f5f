"""HRMConfig: Megatron's TransformerConfig plus the Architecture; and the Architecture of a run's arguments."""
from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from hrm_megatron.config import PREFIX_LM, SIGMOID, Architecture
from hrm_megatron.model_types import HRM


@dataclass
class HRMConfig(TransformerConfig):  # type: ignore[misc]
    """A TransformerConfig for both stacks; `num_layers` counts layers per stack.

    The first `recompute_ticks` ticks with gradient keep only their input; `compile_layers` selects layers/compiled.py,
    `recompute_gated_act` the recompute of layers/gated_recompute.py.
    """

    architecture: Architecture | None = None
    attention_kernel: str = "auto"
    recompute_ticks: int = 0
    compile_layers: bool = False
    recompute_gated_act: bool = False

    @property
    def arch(self) -> Architecture:
        assert self.architecture is not None
        return self.architecture


# Megatron's settings of every HRM: attention output gate, SwiGLU, no biases, no dropout, our own initialization,
# checkpoint keys per layer (stacked keys cannot be shared between the chunks of a pipeline).
HRM_SETTINGS: dict[str, Any] = dict(
    attention_output_gate=True, gated_linear_unit=True, add_bias_linear=False, add_qkv_bias=False,
    hidden_dropout=0.0, attention_dropout=0.0, normalization="RMSNorm", perform_initialization=False,
    bias_dropout_fusion=False, apply_rope_fusion=False, hetereogenous_dist_checkpoint=True,
)


def swiglu_settings(own: bool = False) -> dict[str, bool]:
    """Choose the activation: Megatron's compiled kernel on a GPU; ours on a CPU and if `own` (by Megatron's field
    use_te_activation_func)."""
    fused = torch.cuda.is_available() and not own
    return dict(bias_activation_fusion=fused, use_te_activation_func=not fused)


def hrm_config(architecture: Architecture, **overrides: Any) -> HRMConfig:
    """Build the config of `architecture`; `overrides` are HRMConfig fields (parallel sizes, dtypes ...)."""
    settings: dict[str, Any] = dict(
        num_layers=architecture.num_layers, hidden_size=architecture.hidden_size,
        num_attention_heads=architecture.num_attention_heads, ffn_hidden_size=architecture.ffn_hidden_size,
        layernorm_epsilon=architecture.norm_epsilon, activation_func=F.silu, architecture=architecture,
        transformer_impl="local", params_dtype=torch.float32,
        use_cpu_initialization=not torch.cuda.is_available(), **HRM_SETTINGS,
        **swiglu_settings(overrides.get("compile_layers", False) or overrides.get("recompute_gated_act", False)))
    return HRMConfig(**(settings | {"attention_output_gate": architecture.gated} | overrides))


def architecture_of(args: argparse.Namespace, vocab_size: int) -> Architecture:
    """Return the architecture that the arguments of a run (or of a checkpoint) describe."""
    return Architecture(vocab_size=vocab_size, norm_epsilon=args.layernorm_epsilon,
                        rope_theta=float(args.rotary_base), **{
        "model_type": getattr(args, "model_kind", HRM),  # checkpoints of older versions are HRMs
        "attention_mask": getattr(args, "attention_mask", PREFIX_LM),  # with the PrefixLM mask
        "attention_gate": getattr(args, "attention_gate", SIGMOID),  # and the sigmoid gate
        **{name: getattr(args, name) for name in (
            "num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "h_cycles", "l_cycles",
            "norm_placement", "init_scheme", "init_std")}})
