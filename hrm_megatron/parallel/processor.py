"""What the processor of this machine is fast at, and the matmul that follows from it.

oneDNN's matmul in fp32 is taken on processors on which that of MKL is slower. GFLOP/s on one core of an AMD EPYC with
AVX-512, 2048 rows and 512 x 2048: forward 260 instead of 114, the gradient of the input 237, that of the weight 240
instead of 115; another one, earlier: 100 to 106 instead of 88 to 92, and nothing gained by the gradient of the weight.
Small matmuls pay 12 us a call. On an Intel Xeon with AVX-512 both run the same matmul at 158 to 163, so MKL's stays.
"""
from __future__ import annotations

from pathlib import Path

import torch

CPU_FACTS = Path("/proc/cpuinfo")
MIN_MULTIPLICATIONS = 1 << 24  # of a matmul, below which MKL is not slower


def runs_faster_on_onednn() -> bool:
    """Tell whether oneDNN's matmul in fp32 is faster than MKL's, torch's own choice, which leaves the widest
    instructions of other makers' processors unused."""
    return (torch.backends.mkldnn.is_available() and CPU_FACTS.exists() and "AuthenticAMD" in CPU_FACTS.read_text())


ON_ONEDNN = runs_faster_on_onednn()


def multiplies_on_onednn(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Tell whether `matmul` gives a b^T to oneDNN."""
    return (ON_ONEDNN and not a.is_cuda and a.dtype == torch.float32 and
            a.numel() * len(b) >= MIN_MULTIPLICATIONS)


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a b^T, [m, k] and [n, k] to [m, n]."""
    return _on_onednn(a, b) if multiplies_on_onednn(a, b) else a @ b.t()


def weight_gradient(grad: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return grad^T x, [m, n] and [m, k] to [n, k]."""
    if not multiplies_on_onednn(grad.t(), x.t()):
        return grad.t() @ x
    # A first factor that is transposed is copied, at a third of its memory's speed where m is a power of two.
    return _on_onednn(grad.t(), x.t()) if grad.shape[1] <= x.shape[1] else _on_onednn(x.t(), grad.t()).t()


def _on_onednn(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return out
