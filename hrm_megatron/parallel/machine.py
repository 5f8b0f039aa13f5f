"""What this process has to run on: the facts that rules about layers, number formats and kernels ask for."""
from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Machine:
    """`capability` is that of the CUDA device, `transformer_engine` a version; None for what is not there. `flash`
    says that torch was built with its FlashAttention."""

    capability: tuple[int, int] | None = None
    transformer_engine: str | None = None
    flash: bool = True

    @classmethod
    def here(cls) -> Machine:
        """Look at this process."""
        from megatron.core.extensions.transformer_engine import HAVE_TE  # importing it is the only sure test
        from megatron.core.utils import get_te_version

        return cls(torch.cuda.get_device_capability() if torch.cuda.is_available() else None,
                   str(get_te_version()) if HAVE_TE else None, torch.backends.cuda.is_flash_attention_available())
