"""What a matmul in fp32 is on a GPU: torch follows its environment there, tools must not."""
from __future__ import annotations

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # of weights that tools read and write


def multiply_in_fp32() -> None:
    """Let fp32 be fp32 in this whole process, which a tool has to itself.

    NGC containers export TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1, under which factors in fp32 are rounded to TF32's 10 bits.
    """
    torch.set_float32_matmul_precision("highest")
