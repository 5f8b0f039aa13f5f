"""Transformer Engine's DotProductAttention as a variable-length primitive. Instances need Transformer Engine."""
from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

from hrm_megatron.attention.varlen import VarlenCall
from hrm_megatron.config import ConfigError

MASKS = {False: "padding", True: "padding_causal_bottom_right"}
BACKENDS = ("flash", "fused", "unfused")
SAYS_WHY = "for this run (NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2 says why)"
NO_BACKEND = "No dot product attention backend is available"  # start of its ValueError (DotProductAttention.forward)


def check_backend(kernel: str, backend: AttnBackend) -> None:
    """Refuse an --attention-backend that has no effect on `kernel` or contradicts exported NVTE_* variables."""
    if kernel != "te":
        if backend != AttnBackend.auto:
            raise ConfigError(f"--attention-backend {backend.name}: chooses within --attention-kernel te, and this run "
                              f"takes {kernel}; give that too, or leave it out")
        return
    for one in BACKENDS:  # instead of Megatron's assertion (LanguageModule._set_attention_backend)
        name, wanted = f"NVTE_{one.upper()}_ATTN", str(int(backend.name in ("auto", one)))
        if (value := os.environ.get(name, wanted)) != wanted:
            raise ConfigError(f"{name}={value} is exported, and --attention-backend {backend.name} makes it {wanted}; "
                              f"unset it, and choose by --attention-backend {', '.join(BACKENDS)}")


class NoFusedKernel(torch.nn.Module):
    """Replaces Transformer Engine's unfused path, which materializes the scores of whole sequences."""

    def forward(self, *_: Any, **__: Any) -> torch.Tensor:
        raise ConfigError(f"--attention-kernel te: Transformer Engine finds no fused kernel {SAYS_WHY}; give "
                          "--attention-kernel varlen, or --attention-backend unfused for its slow path")


class TransformerEngineVarlen:
    """cuDNN's fused attention or FlashAttention, whichever Transformer Engine selects; one module per mask.

    Not a torch module, so that the inner ones add no `_extra_state`: checkpoints are the same for all kernels. Under
    NVTE_ALLOW_NONDETERMINISTIC_ALGO=0, which Megatron's --deterministic-mode sets, it selects deterministic kernels.
    """

    def __init__(self, config: TransformerConfig) -> None:
        from transformer_engine.pytorch import DotProductAttention

        heads = config.num_attention_heads // config.tensor_model_parallel_size
        self.modules = {causal: DotProductAttention(
            heads, config.kv_channels, qkv_format="thd", attention_type="cross", attn_mask_type=mask,
            softmax_scale=config.softmax_scale) for causal, mask in MASKS.items()}
        if config.attention_backend != AttnBackend.unfused:
            for module in self.modules.values():
                module.unfused_attention = NoFusedKernel()
        self.backend = config.attention_backend
        self.region = _without_fp8() if config.fp8 else contextlib.nullcontext

    def __call__(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: VarlenCall,
                 scale: float | None) -> torch.Tensor:
        """Run one call; the modules hold the scale."""
        try:
            with self.region():
                out: torch.Tensor = self.modules[call.causal](
                    q, k, v, cu_seqlens_q=call.cu_queries, cu_seqlens_kv=call.cu_keys, max_seqlen_q=call.max_queries,
                    max_seqlen_kv=call.max_keys)
        except ValueError as error:
            if not str(error).startswith(NO_BACKEND):
                raise
            other = "" if self.backend == AttnBackend.auto else "--attention-backend auto, or "
            raise ConfigError(f"--attention-backend {self.backend.name}: Transformer Engine finds none {SAYS_WHY}; "
                              f"give {other}--attention-kernel varlen") from error
        return out.view(q.shape)


def _without_fp8() -> Callable[[], AbstractContextManager[None]]:
    """Return a context without FP8; attention computes in bf16 in any case.

    In an FP8 region its modules, once called, join the all-reduce of delayed scaling's amax values; a rank whose
    examples need only one of the two calls would reduce fewer values than the others, or in another order.
    """
    from transformer_engine import pytorch

    autocast = getattr(pytorch, "autocast", None) or pytorch.fp8_autocast  # its name in older versions
    return functools.partial(autocast, enabled=False)
