"""Select the attention kernel: rules over dtype, head size and a few facts about the machine."""
from __future__ import annotations

import itertools

import torch

from hrm_megatron.attention.flash import choose_generation, first_choice
from hrm_megatron.config import ConfigError
from hrm_megatron.parallel.machine import Machine

AUTO = "auto"
# What each name means, for the log.
WHAT = {
    "te": "Transformer Engine, two calls over all rows",
    "varlen": "FlashAttention 2 inside torch, two calls over all rows",
    "flash": "flash-attn, two calls over all rows",
    "sdpa": "torch's scaled_dot_product_attention, a call for each piece of an example",
    "cpu": "torch's CPU flash kernel, a call for each piece of an example",
    "dense": "the definition in fp64, with the mask of the whole row",
}
ON_CUDA, ON_CPU = ("te", "varlen", "sdpa"), ("cpu",)  # what "auto" tries besides flash, fastest first
# How many of these rank before flash-attn, by its generation. None of it was measured by us. FlashAttention 3: faster
# than cuDNN on Hopper, forward and backward, according to its authors. 4: made for Blackwell like cuDNN's kernels, but
# a beta. 2: the same kernels as in torch.
BEFORE_FLASH = {3: 0, 4: 1, 2: 2}
NARROW = (torch.bfloat16, torch.float16)
AMPERE, HOPPER = (8, 0), (9, 0)


def refusal(kernel: str, dtype: torch.dtype, head_dim: int, machine: Machine,
            deterministic: bool = False) -> str | None:
    """Return why `kernel` cannot run, or None. Sources: torch, aten/native/transformers/cuda/flash_attn/flash_api.cpp;
    Transformer Engine, common/fused_attn/fused_attn.cpp, nvte_get_fused_attn_backend, for training."""
    if kernel == "cpu":
        return "it needs a model on a CPU, and models live on the GPU here" if machine.capability else None
    if kernel not in ("te", "varlen", "flash"):
        return None
    if machine.capability is None:
        return "it needs a CUDA device, and there is none"
    if kernel == "te" and (missing := machine.lacks_transformer_engine()):
        return missing
    if kernel == "varlen" and not machine.flash:
        return "this torch was built without FlashAttention"
    if dtype not in NARROW:
        return f"it takes bf16 and fp16, not {str(dtype).removeprefix('torch.')}"
    # cuDNN supports variable lengths from Hopper on; on older GPUs Transformer Engine could only call flash-attn.
    oldest = HOPPER if kernel == "te" else AMPERE
    if machine.capability < oldest:
        return "it needs a GPU of compute capability {}.{} or more, and this one has {}.{}".format(
            *oldest, *machine.capability)
    largest = 128 if kernel == "te" and machine.capability != HOPPER else 256
    if head_dim % 8 or head_dim > largest:
        return f"it takes heads of a multiple of 8 up to {largest}, not {head_dim}"
    if kernel == "flash":
        found, reason = choose_generation(dtype, head_dim, machine, deterministic)
        return None if found else reason
    return None


def candidates(dtype: torch.dtype, head_dim: int, machine: Machine, deterministic: bool) -> tuple[str, ...]:
    """Return the kernels that "auto" tries on this machine, fastest first."""
    if machine.capability is None:
        return ON_CPU
    found, _ = choose_generation(dtype, head_dim, machine, deterministic)
    place = BEFORE_FLASH[found.generation if found else first_choice(machine)]
    return *ON_CUDA[:place], "flash", *ON_CUDA[place:]


def describe(kernel: str, dtype: torch.dtype, head_dim: int, machine: Machine, deterministic: bool) -> str:
    """Return the description, for the log, of a kernel that can run."""
    if kernel != "flash":
        return f"{kernel} ({WHAT[kernel]})"
    found, _ = choose_generation(dtype, head_dim, machine, deterministic)
    return f"{kernel} ({WHAT[kernel].replace('flash-attn', str(found))})"


def choose_kernel(asked: str, dtype: torch.dtype, head_dim: int, machine: Machine,
                  deterministic: bool = False) -> tuple[str, str]:
    """Return the kernel for `--attention-kernel` and a line that says why. Raises ConfigError if it cannot run.

    `dtype` is that of queries and keys; `deterministic` requires that gradients are accumulated in a fixed order.
    """
    if asked not in (AUTO, *WHAT):
        raise ConfigError(f"attention_kernel={asked!r}: choose one of {AUTO}, {', '.join(WHAT)}")
    facts = dtype, head_dim, machine, deterministic
    reasons = {kernel: refusal(kernel, *facts) for kernel in candidates(*facts)}
    fastest = next(kernel for kernel, reason in reasons.items() if reason is None)
    if asked == AUTO:
        before = itertools.takewhile(lambda one: one[1], reasons.items())
        passed_over = [f"; not {kernel}: {reason}" for kernel, reason in before]
        return fastest, f"{describe(fastest, *facts)}, the fastest that runs here{''.join(passed_over)}"
    if reason := refusal(asked, *facts):
        raise ConfigError(f"--attention-kernel {asked}: {reason}; --attention-kernel {fastest} works here")
    return asked, f"{describe(asked, *facts)}, as asked"
