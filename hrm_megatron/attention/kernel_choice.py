"""Which attention kernel a run takes: plain rules over its number format, its head size and a few facts."""
from __future__ import annotations

import torch

from hrm_megatron.config import ConfigError
from hrm_megatron.parallel.machine import Machine

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


def refusal(kernel: str, dtype: torch.dtype, head_dim: int, machine: Machine) -> str | None:
    """Say why `kernel` cannot run, or None. Sources: torch, aten/native/transformers/cuda/flash_attn/flash_api.cpp;
    Transformer Engine, common/fused_attn/fused_attn.cpp, nvte_get_fused_attn_backend, for training."""
    if kernel == "cpu":
        return "it needs a model on a CPU, and models live on the GPU here" if machine.capability else None
    if kernel not in ("te", "varlen"):
        return None
    if machine.capability is None:
        return "it needs a CUDA device, and there is none"
    if kernel == "te" and (missing := machine.lacks_transformer_engine()):
        return missing
    if kernel == "varlen" and not machine.flash:
        return "this torch was built without FlashAttention"
    if dtype not in NARROW:
        return f"it takes bf16 and fp16, not {str(dtype).removeprefix('torch.')}"
    if machine.capability < AMPERE:
        return "it needs a GPU of compute capability 8.0 or more, and this one has {}.{}".format(*machine.capability)
    largest = 256 if kernel == "varlen" or machine.capability == HOPPER else 128
    if head_dim % 8 or head_dim > largest:
        return f"it takes heads of a multiple of 8 up to {largest}, not {head_dim}"
    return None


def choose_kernel(asked: str, dtype: torch.dtype, head_dim: int, machine: Machine) -> tuple[str, str]:
    """Return the kernel for `--attention-kernel` and a line that says why. Raises ConfigError if it cannot run.

    `dtype` is that of queries and keys.
    """
    if asked not in (AUTO, *WHAT):
        raise ConfigError(f"attention_kernel={asked!r}: choose one of {AUTO}, {', '.join(WHAT)}")
    candidates = ON_CUDA if machine.capability else ON_CPU
    reasons = {kernel: refusal(kernel, dtype, head_dim, machine) for kernel in candidates}
    fastest = next(kernel for kernel, reason in reasons.items() if reason is None)
    if asked == AUTO:
        passed_over = [f"; not {kernel}: {reason}" for kernel, reason in reasons.items() if reason]
        return fastest, f"{fastest} ({WHAT[fastest]}), the fastest that runs here{''.join(passed_over)}"
    if reason := refusal(asked, dtype, head_dim, machine):
        raise ConfigError(f"--attention-kernel {asked}: {reason}; --attention-kernel {fastest} works here")
    return asked, f"{asked} ({WHAT[asked]}), as asked"
