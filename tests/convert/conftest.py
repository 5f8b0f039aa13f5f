from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from hrm_megatron.parallel.cpu import activate

activate()

from hrm_megatron.config import Architecture  # noqa: E402
from hrm_megatron.convert.checkpoint import PARTS, Checkpoint, Training  # noqa: E402
from hrm_megatron.convert.table import table  # noqa: E402
from tests.tools import load_tool  # noqa: E402

# Unequal sizes, and an FFN that is no multiple of 256.
SMALL = Architecture(num_layers=2, hidden_size=24, num_attention_heads=3, ffn_hidden_size=40, vocab_size=250,
                     h_cycles=3, l_cycles=2)


def _random_checkpoint(architecture: Architecture = SMALL) -> Checkpoint:
    """A checkpoint of 7 steps, 5 of them of the embedding, with random numbers everywhere."""
    generator = torch.Generator().manual_seed(3)
    state = {(part, entry.megatron): torch.randn(entry.shape, generator=generator)
             for entry in table(architecture) for part in PARTS}
    return Checkpoint(
        Path("random"), architecture, Training(seq_length=48, tokens_per_step=96, total_steps=9, last_lr=0.25), 7, 5,
        frozenset(PARTS),
        lambda part, entry: state[part, entry.megatron].to(torch.float32 if entry.trained else torch.bfloat16))


def _same_state(one: Checkpoint, other: Checkpoint, parts: Sequence[str] = PARTS) -> bool:
    """Tell whether two checkpoints agree bitwise in everything that training goes on from."""
    return (one.iteration, one.embedding_updates) == (other.iteration, other.embedding_updates) and all(
        torch.equal(a, b) and a.dtype == b.dtype for entry in table(one.architecture)
        for part in (parts if entry.trained else ["raw"])
        for a, b in [(one.read(part, entry), other.read(part, entry))])


@pytest.fixture(scope="session")
def random_checkpoint():
    return _random_checkpoint


@pytest.fixture(scope="session")
def same_state():
    return _same_state


@pytest.fixture
def tool() -> Callable[[Sequence[str]], int]:
    """`main` of tools/convert_checkpoint.py."""
    return load_tool("convert_checkpoint").main
