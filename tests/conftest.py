"""Settings for all tests: one thread per process, and GPU tests skipped where there is no GPU."""
from __future__ import annotations

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before anything imports torch; ranks share the cores


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked gpu where torch sees no CUDA device."""
    if item.get_closest_marker("gpu"):
        import torch  # late: most of the house tests need no torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
