"""What the processor of this machine is fast at."""
from __future__ import annotations

from pathlib import Path

import torch

CPU_FACTS = Path("/proc/cpuinfo")


def runs_faster_on_onednn() -> bool:
    """Tell whether oneDNN's matmul in fp32 is faster than MKL's, torch's own choice, which leaves the widest
    instructions of other makers' processors unused."""
    return (torch.backends.mkldnn.is_available() and CPU_FACTS.exists() and "AuthenticAMD" in CPU_FACTS.read_text())


ON_ONEDNN = runs_faster_on_onednn()
