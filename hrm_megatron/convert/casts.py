"""Cast floats to a narrower dtype, refusing values that it cannot represent."""
from __future__ import annotations

import torch

from hrm_megatron.config import ConfigError


def rounded(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round a tensor to this dtype; NaN and infinities are kept, a finite value that would overflow is refused."""
    cast = tensor.to(dtype)
    if cast is tensor or all(end.isfinite() for end in cast.aminmax()):
        return cast
    if (lost := cast.isinf() & tensor.isfinite()).any():
        raise ConfigError(f"{name}: holds {float(tensor[lost][0]):.4g}, which {str(dtype).removeprefix('torch.')} does "
                          "not reach; choose --dtype float32")
    return cast


def as_start(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Return the initial z_L in bfloat16, as in every run; refuse values that bfloat16 cannot hold exactly."""
    cast = tensor.to(torch.bfloat16)
    if (lost := (cast.to(tensor.dtype) != tensor) & ~tensor.isnan()).any():
        raise ConfigError(f"{name}: holds {float(tensor[lost][0]):.9g}, which bfloat16 does not have, and the start of "
                          "z_L is kept in that; round it to bfloat16 and save the model again")
    return cast
