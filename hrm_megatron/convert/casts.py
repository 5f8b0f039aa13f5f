"""Floats in a narrower type, refused where that has no such number."""
from __future__ import annotations

import torch

from hrm_megatron.config import ConfigError


def rounded(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round a tensor to this type; NaN and infinities stay, a number that would become infinite is refused."""
    cast = tensor.to(dtype)
    if cast is tensor or all(end.isfinite() for end in cast.aminmax()):
        return cast
    if (lost := cast.isinf() & tensor.isfinite()).any():
        raise ConfigError(f"{name}: holds {float(tensor[lost][0]):.4g}, which {str(dtype).removeprefix('torch.')} does "
                          "not reach; choose --dtype float32")
    return cast


def as_start(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return the start of z_L, which is one of bfloat16 in every run, in that type; refuse any other."""
    cast = tensor.to(torch.bfloat16)
    if (lost := (cast.to(tensor.dtype) != tensor) & ~tensor.isnan()).any():
        raise ConfigError(f"{name}: holds {float(tensor[lost][0]):.9g}, which bfloat16 does not have, and the start of "
                          "z_L is kept in that; round it to bfloat16 and save the model again")
    return cast
