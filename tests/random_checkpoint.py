"""A Megatron checkpoint of a random model over the golden tokenizer's vocabulary."""
from __future__ import annotations

from pathlib import Path

import torch

from hrm_megatron.config import Architecture

TOKENIZER = Path(__file__).parent / "golden" / "tokenizer"


def write_random_checkpoint(folder: Path, seq_length: int, std: float = 0.7, ffn_hidden_size: int = 40) -> Path:
    """Write one whose raw and EMA weights are unlike; needs Megatron's single rank.

    At a std of 0.7 attention matters much, and so does rounding; 1 / sqrt(24) is that of initial weights.
    """
    from hrm_megatron.convert.checkpoint import PARTS, Checkpoint, Training
    from hrm_megatron.convert.to_megatron import write_megatron
    from hrm_megatron.data.tokenizer import TextTokenizer

    vocab_size = TextTokenizer(TOKENIZER).vocab_size
    assert vocab_size != 256
    generator = torch.Generator().manual_seed(3)

    def read(part, entry):
        tensor = torch.randn(entry.shape, generator=generator) * std
        return tensor if entry.trained else tensor.bfloat16()

    write_megatron(Checkpoint(Path("random"), Architecture(1, 24, 3, ffn_hidden_size, vocab_size), Training(
        seq_length=seq_length, tokens_per_step=96, total_steps=9), 7, 5, frozenset(PARTS), read), folder)
    return folder
