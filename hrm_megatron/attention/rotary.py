"""Rotary position embedding: the table of a micro-batch, made once and read at every tick."""
from __future__ import annotations

from dataclasses import dataclass

import torch

from hrm_megatron.layers.functions import RotateFunction, rotated, run


@dataclass(frozen=True)
class Rotation:
    """Cosines [s, b, 1, head_dim] and sines [s, b, 1, head_dim / 2] of every position, fp32."""

    cos: torch.Tensor
    sin: torch.Tensor

    @classmethod
    def of(cls, position_ids: torch.Tensor, head_dim: int, theta: float) -> Rotation:
        """Angles from the positions [b, s] themselves, so that they restart in every example."""
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
        angles = position_ids.t()[..., None, None].float() * theta ** -exponents
        cos = angles.cos()
        return cls(torch.cat((cos, cos), -1), angles.sin())

    def __call__(self, *states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Rotate queries, keys or both, [s, b, heads, head_dim] each; results have the dtype of what they were."""
        if torch.compiler.is_compiling():
            return tuple(rotated(x, self.cos, self.sin) for x in states)
        out: tuple[torch.Tensor, ...] = run(RotateFunction, self.cos, self.sin, *states)
        return out
