"""Choose the faster fp32 matmul on this machine's CPU: oneDNN's where MKL's is slower.

GFLOP/s on one core of an AMD EPYC with AVX-512, 2048 rows and 512 x 2048: forward 260 instead of MKL's 114, input
gradient 237, weight gradient 240 instead of 115; on another, older EPYC: 100 to 106 instead of 88 to 92, and no gain
for the weight gradient. Each oneDNN call costs 12 us, so small matmuls do not gain. On an Intel Xeon with AVX-512 both
reach 158 to 163, so MKL is kept there.
"""
from __future__ import annotations

import os
from pathlib import Path

import torch

CPU_FACTS = Path("/proc/cpuinfo")
MIN_MULTIPLICATIONS = 1 << 24  # m * n * k of a matmul, below which MKL is not slower


def runs_faster_on_onednn() -> bool:
    """Tell whether oneDNN's fp32 matmul is faster than MKL's, torch's default, which does not use AVX-512 on CPUs that
    are not Intel's."""
    return (torch.backends.mkldnn.is_available() and CPU_FACTS.exists() and "AuthenticAMD" in CPU_FACTS.read_text())


def loops_have_avx_512() -> bool:
    """Tell whether this CPU has AVX-512 and numba compiles for it: these variables name another CPU, or none."""
    elsewhere = any(os.environ.get(name) for name in ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_DISABLE_JIT"))
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and not elsewhere


ON_ONEDNN = runs_faster_on_onednn()
HAS_AVX_512 = loops_have_avx_512()


def multiplies_on_onednn(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Tell whether `matmul(a, b)` uses oneDNN."""
    return (ON_ONEDNN and not a.is_cuda and a.dtype == torch.float32 and
            a.numel() * len(b) >= MIN_MULTIPLICATIONS)


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a b^T [m, n] for a [m, k] and b [n, k]."""
    return _on_onednn(a, b) if multiplies_on_onednn(a, b) else a @ b.t()


def weight_gradient(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return grad^T x [n, k] for grad [m, n] and x [m, k]."""
    if not multiplies_on_onednn(grad.t(), x.t()):
        return grad.t() @ x
    # oneDNN copies a transposed first operand, at a third of the memory bandwidth if m is a power of two.
    return _on_onednn(grad.t(), x.t()) if grad.shape[1] <= x.shape[1] else _on_onednn(x.t(), grad.t()).t()


def _on_onednn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return out
