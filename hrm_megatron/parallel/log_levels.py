"""Silence for tools: what Megatron and torch remark about packages that are not installed and not needed."""
from __future__ import annotations

import logging
import warnings


def be_quiet() -> None:
    """Leave out warnings; call it before anything of Megatron is imported. Errors are still shown."""
    warnings.simplefilter("ignore")
    for name in ("megatron", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)
