"""flash-attn as a variable-length primitive, and the rules that select its generation (FlashAttention 2, 3 or 4).

Sources of the rules: flash-attn 2.8.3, csrc/flash_attn/flash_api.cpp; its hopper/setup.py and hopper/flash_api.cpp for
FlashAttention 3; flash-attn-4 4.0.0b20 to b36, flash_attn/cute/interface.py; Transformer Engine 2.16.1,
dot_product_attention/utils.py, for what it disables and why.
"""
from __future__ import annotations

import torch
from packaging.version import InvalidVersion, Version

from hrm_megatron.attention.varlen import Primitive, VarlenCall
from hrm_megatron.parallel.flash_attn import FlashAttn
from hrm_megatron.parallel.machine import Machine

# Version 2: bottom-right causal mask since 2.1, deterministic backward since 2.4.1, backward for heads of 256 on every
# GPU since 2.5.5. Version 4: the minimum of Megatron-Core.
OLDEST = {2: "2.5.5", 4: "4.0.0b20"}
OLDEST_2_ON_BLACKWELL = "2.7.3"
# FlashAttention 3 kept the version 3.0.0b1 throughout 2025, and most of these builds accept `deterministic` but ignore
# it in the backward launch (flash-attention, pull requests 1766 and 1893).
OLDEST_DETERMINISTIC_3 = "3.0.0"
HEADS_OF_3 = (64, 96, 128, 192, 256)  # head sizes its kernels are built for; others are rounded up
# Major compute capability > generations; the first that can run is taken. On Hopper the released 2 goes before the beta
# 4. On Blackwell 2 runs its Ampere kernels and 3 has none. 3 can be built for 8.x too, but 2 was made for it. The
# backward of 4 does not support 8.x, nor 12.x deterministically.
GENERATIONS = {8: (2,), 9: (3, 2, 4), 10: (4, 2), 11: (4, 2), 12: (2,)}
INSTALL_FLASH_ATTN = "docs/gpu.md says how"


def choose_generation(dtype: torch.dtype, head_dim: int, machine: Machine,
                      deterministic: bool) -> tuple[FlashAttn | None, str]:
    """Return the flash-attn installation to use and ""; or None and why no installed one can be used."""
    assert machine.capability is not None
    order = GENERATIONS.get(machine.capability[0], ())
    reasons = []
    for found in sorted(machine.flash_attn, key=lambda one: (*order, one.generation).index(one.generation)):
        reason = refusal(found, dtype, head_dim, machine.capability, deterministic)
        if reason is None:
            return found, ""
        reasons.append(f"{found}: {reason}")
    return None, ", ".join(reasons) or f"flash-attn is not installed ({INSTALL_FLASH_ATTN})"


def first_choice(machine: Machine) -> int:
    """Return the generation that this machine would use if all were installed."""
    assert machine.capability is not None
    return GENERATIONS.get(machine.capability[0], (2,))[0]


def refusal(found: FlashAttn, dtype: torch.dtype, head_dim: int, capability: tuple[int, int],
            deterministic: bool) -> str | None:
    """Return why this installation cannot run heads of `head_dim` (a multiple of 8 up to 256) in bf16 or fp16, or
    None."""
    here = "{}.{}".format(*capability)
    if found.fault:
        return found.fault
    if found.generation not in GENERATIONS.get(capability[0], ()):
        return f"it is not for compute capability {here}"
    oldest = OLDEST.get(found.generation)
    if found.generation == 2 and capability >= (10, 0):
        oldest = OLDEST_2_ON_BLACKWELL
    if oldest and not reaches(found.version, oldest):
        return f"older than {oldest} ({INSTALL_FLASH_ATTN})"
    if found.generation == 3:
        return _refusal_of_3(found, dtype, head_dim, deterministic)
    if found.generation == 4 and (head_dim % 32 or head_dim > 128):
        # For other multiples of 8, betas computed wrong gradients on Blackwell (flash-attention, pull request 2698).
        return f"it takes heads of a multiple of 32 up to 128, not {head_dim}"
    return None


def _refusal_of_3(found: FlashAttn, dtype: torch.dtype, head_dim: int, deterministic: bool) -> str | None:
    sizes = [size for size in HEADS_OF_3 if f"HDIM{size}" not in found.left_out and size >= head_dim]
    missing = [what for what in ("BACKWARD", "VARLEN", "FP16") if what in found.left_out
               and (what != "FP16" or dtype == torch.float16)]
    if missing or not sizes:
        return f"built with FLASH_ATTENTION_DISABLE_{missing[0] if missing else f'HDIM{head_dim}'}"
    if deterministic and not reaches(found.version, OLDEST_DETERMINISTIC_3):
        return f"--deterministic-mode: builds before {OLDEST_DETERMINISTIC_3} may add gradients in any order"
    if deterministic and sizes[0] == 256:
        return f"--deterministic-mode: it has no such backward for heads of {head_dim}"
    return None


def reaches(version: str | None, oldest: str) -> bool:
    """Whether `version` is at least `oldest`; a beta is older than its release."""
    try:
        return version is not None and Version(version) >= Version(oldest)
    except InvalidVersion:
        return False


def flash_varlen(found: FlashAttn, deterministic: bool) -> Primitive:
    """Return the primitive of this installation; `deterministic`: its backward accumulates in a fixed order."""
    function = found.function()

    def primitive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: VarlenCall,
                  scale: float | None) -> torch.Tensor:
        out = function(q, k, v, cu_seqlens_q=call.cu_queries, cu_seqlens_k=call.cu_keys, max_seqlen_q=call.max_queries,
                       max_seqlen_k=call.max_keys, softmax_scale=scale, causal=call.causal,
                       deterministic=deterministic)
        result: torch.Tensor = out[0] if isinstance(out, tuple) else out  # 4 and some builds of 3 add log-sum-exp
        return result
    return primitive
