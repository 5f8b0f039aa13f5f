from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hrm_megatron.parallel.cpu import activate

activate()

from hrm_megatron.config import Architecture  # noqa: E402
from hrm_megatron.convert.checkpoint import RAW, Checkpoint, Training  # noqa: E402
from hrm_megatron.convert.hf import write_hf  # noqa: E402
from hrm_megatron.convert.table import table  # noqa: E402
from hrm_megatron.data.tokenizer import TextTokenizer, save_tokenizer, train_tokenizer  # noqa: E402
from tests.stores import write_store  # noqa: E402
from tests.tools import load_tool  # noqa: E402

ROW_TOKENS = 48


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory) -> TextTokenizer:
    folder = tmp_path_factory.mktemp("quantize") / "tokenizer"
    save_tokenizer(train_tokenizer(["ab"], 300), folder)
    return TextTokenizer(folder)


@pytest.fixture(scope="session")
def architecture(tokenizer) -> Architecture:
    """Unequal sizes, all of them multiples of 64, and unequal cycles."""
    return Architecture(num_layers=2, hidden_size=64, num_attention_heads=2, ffn_hidden_size=192,
                        vocab_size=tokenizer.vocab_size, h_cycles=2, l_cycles=3)


@pytest.fixture(scope="session")
def weights(architecture) -> dict[str, torch.Tensor]:
    """Random weights as training begins with, by transformers' names; z_L is one of bfloat16."""
    generator = torch.Generator().manual_seed(2)
    made = {entry.hf: torch.randn(entry.shape, generator=generator) / entry.shape[-1] ** 0.5
            for entry in table(architecture)}
    return {name: tensor.bfloat16().float() if tensor.dim() == 1 else tensor for name, tensor in made.items()}


@pytest.fixture(scope="session")
def checkpoint_of(architecture):
    """Make a checkpoint of such weights."""
    def make(weights: dict[str, torch.Tensor], architecture: Architecture = architecture) -> Checkpoint:
        def read(_, entry):
            return entry.to_megatron(weights[entry.hf].to(torch.float32 if entry.trained else torch.bfloat16))
        return Checkpoint(Path("random"), architecture, Training(seq_length=ROW_TOKENS), 0, 0, frozenset({RAW}), read)
    return make


@pytest.fixture(scope="session")
def exported(checkpoint_of, weights, tokenizer, tmp_path_factory) -> Path:
    """A transformers folder of these weights in fp32, with a tokenizer."""
    folder = tmp_path_factory.mktemp("quantize") / "hf"
    write_hf(checkpoint_of(weights), folder, RAW, tokenizer=tokenizer.path)
    return folder


@pytest.fixture(scope="session")
def store(tokenizer, tmp_path_factory) -> str:
    """Prefix of a dataset of random examples."""
    prefix = str(tmp_path_factory.mktemp("quantize") / "store")
    rng = np.random.default_rng(4)
    write_store(prefix, ([rng.integers(0, tokenizer.vocab_size, length) for length in rng.integers(2, 12, 2)]
                         for _ in range(120)), tokenizer)
    return prefix


@pytest.fixture
def tool():
    """`main` of tools/quantize_checkpoint.py."""
    return load_tool("quantize_checkpoint").main
