"""Rotary position embedding (Su et al., arXiv 2104.09864), half rotation, computed in fp32 and rounded once."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Rotation:
    """Cosines and sines of every position, fp32 [s, b, 1, head_dim / 2], the same for all layers and ticks."""

    cos: torch.Tensor
    sin: torch.Tensor

    @classmethod
    def of(cls, position_ids: torch.Tensor, head_dim: int, theta: float) -> Rotation:
        """Angles from the positions [b, s] themselves, so that they restart in every example."""
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
        angles = position_ids.t()[..., None, None].float() * theta ** -exponents
        return cls(angles.cos(), angles.sin())

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Rotate queries or keys [s, b, heads, head_dim]; the result has the dtype of `x`."""
        rotated: torch.Tensor = _Rotate.apply(x, self.cos, self.sin)
        return rotated


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.float().chunk(2, -1)
    out = torch.empty(x.shape, dtype=torch.float32, device=x.device)
    first, second = out.chunk(2, -1)
    torch.mul(a, cos, out=first).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=second).addcmul_(a, sin)
    return out.to(x.dtype)


class _Rotate(torch.autograd.Function):
    """Written out to save nothing but the table: the gradient is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotate(grads[0], cos, -sin), None, None
