"""What attention on a CPU needs at every step."""
from __future__ import annotations

import torch

from hrm_megatron.attention.rotary import Rotation


class Loops:
    """Attention's compiled loops, and the cosines and sines [context, d/2] of every position."""

    def __init__(self, context_tokens: int, head_dim: int, theta: float) -> None:
        from hrm_megatron.generate import attention_kernels  # late: numba takes half a second

        self.kernels = attention_kernels
        rotation = Rotation.of(torch.arange(context_tokens)[None], head_dim, theta)
        self.cos = rotation.cos[:, 0, 0, :head_dim // 2].contiguous().numpy()
        self.sin = rotation.sin[:, 0, 0].contiguous().numpy()
