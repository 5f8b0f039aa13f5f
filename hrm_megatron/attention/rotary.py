"""Rotary position embedding: the table of a micro-batch, computed once and used at every tick."""
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
        """Compute the table from position ids [b, s], which restart in every example."""
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position_ids.device) / head_dim
        angles = position_ids.t()[..., None, None].float() * theta ** -exponents
        cos = angles.cos()
        return cls(torch.cat((cos, cos), -1), angles.sin())

    def __call__(self, *states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Rotate queries, keys or both, each [s, b, heads, head_dim]; dtypes are kept."""
        if torch.compiler.is_compiling():
            return tuple(rotated(x, self.cos, self.sin) for x in states)
        out: tuple[torch.Tensor, ...] = run(RotateFunction, self.cos, self.sin, *states)
        return out
