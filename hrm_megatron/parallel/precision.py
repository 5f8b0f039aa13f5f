"""Force true fp32 matmuls (no TF32) in the tools, whatever the environment variables say."""
from __future__ import annotations

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}  # of the weights that tools read and write


def multiply_in_fp32() -> None:
    """Disable TF32 in this process; for tools, not for libraries.

    NGC containers export TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1, which rounds fp32 operands to TF32's 10-bit mantissa.
    """
    torch.set_float32_matmul_precision("highest")
