from __future__ import annotations

from pathlib import Path

import pytest

from hrm_megatron.parallel.cpu import activate

activate()

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def converted(single_rank, tmp_path_factory):
    """The golden native checkpoint (10 steps) as Megatron's: the folder that --load names."""
    from hrm_megatron.convert.native import read_native
    from hrm_megatron.convert.to_megatron import write_megatron

    folder = tmp_path_factory.mktemp("generate") / "checkpoints"
    write_megatron(read_native(ROOT / "tests" / "golden" / "native_ckpt"), folder)
    return folder


@pytest.fixture
def model(converted):
    """The model with EMA weights, made anew for each test."""
    from hrm_megatron.generate.load import load_model, open_checkpoint

    return load_model(open_checkpoint(converted))


@pytest.fixture(scope="session")
def untrained(single_rank):
    """Build an HRMModel of such an architecture with random weights."""
    from hrm_megatron.config import Architecture
    from hrm_megatron.model.hrm import HRMModel
    from hrm_megatron.transformer_config import hrm_config

    def build(*sizes, seed=5, **settings):
        return HRMModel(hrm_config(Architecture(*sizes, **settings)), seed=seed).eval()
    return build
