"""Hardware and optional libraries of this process, which decide the available layers, number formats and kernels."""
from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from hrm_megatron.parallel.flash_attn import FlashAttn, installed_flash_attn

OLDEST_TE = (2, 2)  # Megatron-Core 0.19.2 supports FP8 parameters and current scaling from this version (fp8_utils.py)
INSTALL_TE = 'pip install "transformer-engine[pytorch,core_cu13]"'


@dataclass(frozen=True)
class Machine:
    """The CUDA device's compute capability and Transformer Engine's version (None if absent); `flash`: torch was built
    with FlashAttention; `flash_attn`: the installed generations of that package."""

    capability: tuple[int, int] | None = None
    transformer_engine: str | None = None
    flash: bool = True
    flash_attn: tuple[FlashAttn, ...] = ()

    @classmethod
    def here(cls) -> Machine:
        """Return the machine of this process."""
        from megatron.core.extensions.transformer_engine import HAVE_TE  # importing it is the only sure test
        from megatron.core.utils import get_te_version

        cuda = torch.cuda.is_available()
        return cls(torch.cuda.get_device_capability() if cuda else None, str(get_te_version()) if HAVE_TE else None,
                   torch.backends.cuda.is_flash_attention_available(), installed_flash_attn() if cuda else ())

    def lacks_transformer_engine(self, oldest: tuple[int, int] = OLDEST_TE) -> str | None:
        """Return why Transformer Engine of at least version `oldest` cannot be used, or None if it can."""
        version = self.transformer_engine
        if self.capability is None:
            return "Transformer Engine needs a CUDA device, and there is none"
        if version is None:
            return f"Transformer Engine is not installed ({INSTALL_TE})"
        if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < oldest:
            return f"Transformer Engine {version} is older than {'.'.join(map(str, oldest))} ({INSTALL_TE})"
        return None
