"""A narrower type takes the numbers that it has, and no other."""
from __future__ import annotations

import pytest
import torch

from hrm_megatron.config import ConfigError
from hrm_megatron.convert.casts import as_start, rounded


def test_rounding_never_makes_an_infinity():
    tensor = torch.tensor([[1.001, float("nan")], [float("-inf"), 3.38e38]])
    assert torch.equal(rounded("w", tensor, torch.bfloat16).isfinite(), tensor.isfinite())
    assert rounded("w", tensor, torch.float32) is tensor
    tensor[0, 0] = -3.4e38
    with pytest.raises(ConfigError, match=r"^w: holds -3\.4e\+38, which bfloat16 does not reach; choose --dtype"):
        rounded("w", tensor, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_start_is_one_of_bfloat16(dtype):
    start = torch.tensor([0.5, -3.140625, float("nan")], dtype=dtype)
    assert torch.equal(as_start("z", start).nan_to_num(7), start.bfloat16().nan_to_num(7))
    if dtype != torch.bfloat16:
        start[1] = 1.0009765625
        with pytest.raises(ConfigError, match=r"^z: holds 1\.00097656, which bfloat16 does not have"):
            as_start("z", start)
