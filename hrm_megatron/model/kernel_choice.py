"""Which attention kernel a run takes: plain rules over its number format, its head size and a few facts."""
from __future__ import annotations

from dataclasses import dataclass

import torch

from hrm_megatron.config import ConfigError

AUTO = "auto"
# What stands behind each name, for the log.
WHAT = {
    "te": "Transformer Engine, two calls over all rows",
    "varlen": "FlashAttention 2 inside torch, two calls over all rows",
    "sdpa": "torch's scaled_dot_product_attention, a call for each piece of an example",
    "cpu": "torch's CPU flash kernel, a call for each piece of an example",
    "dense": "the definition in fp64, with the mask of the whole row",
}
ON_CUDA, ON_CPU = ("te", "varlen", "sdpa"), ("cpu",)  # what "auto" tries, the fastest first
NARROW = (torch.bfloat16, torch.float16)
AMPERE, HOPPER = (8, 0), (9, 0)


@dataclass(frozen=True)
class Facts:
    """What the rules ask of a machine."""

    capability: tuple[int, int] | None = None  # of the CUDA device; None where there is none
    transformer_engine: bool = False  # it can be imported
    flash: bool = True  # torch was built with its FlashAttention

    @classmethod
    def here(cls) -> Facts:
        """Look at this process."""
        from megatron.core.extensions.transformer_engine import HAVE_TE  # importing it is the only sure test

        return cls(torch.cuda.get_device_capability() if torch.cuda.is_available() else None, HAVE_TE,
                   torch.backends.cuda.is_flash_attention_available())


def refusal(kernel: str, dtype: torch.dtype, head_dim: int, facts: Facts) -> str | None:
    """Say why `kernel` cannot run, or None. Sources: torch, aten/native/transformers/cuda/flash_attn/flash_api.cpp;
    Transformer Engine, common/fused_attn/fused_attn.cpp, nvte_get_fused_attn_backend, for training."""
    if kernel == "cpu":
        return "it needs a model on a CPU, and models live on the GPU here" if facts.capability else None
    if kernel not in ("te", "varlen"):
        return None
    if facts.capability is None:
        return "it needs a CUDA device, and there is none"
    if kernel == "te" and not facts.transformer_engine:
        return "Transformer Engine is not installed"
    if kernel == "varlen" and not facts.flash:
        return "this torch was built without FlashAttention"
    if dtype not in NARROW:
        return f"it takes bf16 and fp16, not {str(dtype).removeprefix('torch.')}"
    if facts.capability < AMPERE:
        return "it needs a GPU of compute capability 8.0 or more, and this one has {}.{}".format(*facts.capability)
    largest = 256 if kernel == "varlen" or facts.capability == HOPPER else 128
    if head_dim % 8 or head_dim > largest:
        return f"it takes heads of a multiple of 8 up to {largest}, not {head_dim}"
    return None


def choose_kernel(asked: str, dtype: torch.dtype, head_dim: int, facts: Facts) -> tuple[str, str]:
    """Return the kernel for `--attention-kernel` and a line that says why. Raises ConfigError if it cannot run.

    `dtype` is that of queries and keys.
    """
    if asked not in (AUTO, *WHAT):
        raise ConfigError(f"attention_kernel={asked!r}: choose one of {AUTO}, {', '.join(WHAT)}")
    reasons = {kernel: refusal(kernel, dtype, head_dim, facts) for kernel in (ON_CUDA if facts.capability else ON_CPU)}
    fastest = next(kernel for kernel, reason in reasons.items() if reason is None)
    if asked == AUTO:
        passed_over = [f"; not {kernel}: {reason}" for kernel, reason in reasons.items() if reason]
        return fastest, f"{fastest} ({WHAT[fastest]}), the fastest that runs here{''.join(passed_over)}"
    if reason := refusal(asked, dtype, head_dim, facts):
        raise ConfigError(f"--attention-kernel {asked}: {reason}; --attention-kernel {fastest} works here")
    return asked, f"{asked} ({WHAT[asked]}), as asked"
