"""flash-attn as a variable-length primitive, and the rules for which of its generations a run takes.

Sources of the rules: flash-attn 2.8.3, csrc/flash_attn/flash_api.cpp; its hopper/setup.py and hopper/flash_api.cpp for
FlashAttention 3; flash-attn-4 4.0.0b20 to b36, flash_attn/cute/interface.py; Transformer Engine 2.16.1,
dot_product_attention/utils.py, for what it turns off and why.
"""
from __future__ import annotations

import torch
from packaging.version import InvalidVersion, Version

from hrm_megatron.attention.varlen import Primitive, VarlenCall
from hrm_megatron.parallel.flash_attn import FlashAttn
from hrm_megatron.parallel.machine import Machine

# Version 2: causal at the bottom right since 2.1, a deterministic backward since 2.4.1, one for heads of 256 on every
# GPU since 2.5.5. 4: Megatron-Core's own minimum.
OLDEST = {2: "2.5.5", 4: "4.0.0b20"}
OLDEST_2_ON_BLACKWELL = "2.7.3"
# FlashAttention 3 had 3.0.0b1 for a version all through 2025, and most of these builds take `deterministic` and drop
# it in the launch of the backward (flash-attention, pull requests 1766 and 1893).
OLDEST_DETERMINISTIC_3 = "3.0.0"
HEADS_OF_3 = (64, 96, 128, 192, 256)  # what its kernels are built for; others are rounded up
# Major compute capability > generations, the first that can run wins. On Hopper the released 2 goes before the beta 4;
# on Blackwell 2 is Ampere's code and 3 has none. 3 can be built for 8.x too, which 2 was made for. The backward of 4
# knows neither 8.x nor, in a fixed order, 12.x.
GENERATIONS = {8: (2,), 9: (3, 2, 4), 10: (4, 2), 11: (4, 2), 12: (2,)}
INSTALL_FLASH_ATTN = "docs/gpu.md says how"


def choose_generation(dtype: torch.dtype, head_dim: int, machine: Machine,
                      deterministic: bool) -> tuple[FlashAttn | None, str]:
    """Return the generation of flash-attn to use; or None, and why none of those installed can be."""
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
    """Return the generation that this machine would take if all were installed."""
    assert machine.capability is not None
    return GENERATIONS.get(machine.capability[0], (2,))[0]


def refusal(found: FlashAttn, dtype: torch.dtype, head_dim: int, capability: tuple[int, int],
            deterministic: bool) -> str | None:
    """Say why this installation cannot run bf16 or fp16 heads of a multiple of 8 up to 256, or None."""
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
        # Between them, gradients of betas were wrong on Blackwell (flash-attention, pull request 2698).
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
    """Tell whether `version` is `oldest` or newer; a beta is older than what it leads to."""
    try:
        return version is not None and Version(version) >= Version(oldest)
    except InvalidVersion:
        return False


def flash_varlen(found: FlashAttn, deterministic: bool) -> Primitive:
    """Make the primitive of this installation; `deterministic`: its backward adds in one order."""
    function = found.function()

    def primitive(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: VarlenCall,
                  scale: float | None) -> torch.Tensor:
        out = function(q, k, v, cu_seqlens_q=call.cu_queries, cu_seqlens_k=call.cu_keys, max_seqlen_q=call.max_queries,
                       max_seqlen_k=call.max_keys, softmax_scale=scale, causal=call.causal,
                       deterministic=deterministic)
        result: torch.Tensor = out[0] if isinstance(out, tuple) else out  # 4 and some builds of 3 add log-sums
        return result
    return primitive
