"""A training step in fp32 on the CPU, and the same step of transformers' HrmText."""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import transformers
from transformers import HrmTextConfig, HrmTextForCausalLM

from hrm_megatron.attention.prefix_lm import PrefixSequences
from hrm_megatron.attention.rotary import Rotation
from hrm_megatron.config import Architecture, ConfigError, ffn_hidden_size
from hrm_megatron.data.batch import IGNORED_LABEL, PackedBatch, assemble_row
from hrm_megatron.model.hrm import HRMModel
from hrm_megatron.model.ticks import split_bp_steps
from hrm_megatron.transformer_config import hrm_config

ROW_TOKENS = 2048
BP_STEPS = 5
ARCHITECTURE = Architecture(num_layers=2, hidden_size=512, num_attention_heads=8, ffn_hidden_size=ffn_hidden_size(512),
                            vocab_size=4096)
PREFIXES = (96, 160, 64, 128, 200, 80, 112, 100)  # eight examples that fill the row
RESPONSES = (160, 96, 192, 128, 56, 176, 144, 156)


def packed_row(seed: int = 0) -> dict[str, torch.Tensor]:
    """Return one full row of random tokens, tensors [1, s]."""
    rng = np.random.default_rng(seed)
    examples = [(rng.integers(1, ARCHITECTURE.vocab_size, p), rng.integers(1, ARCHITECTURE.vocab_size, r + 1))
                for p, r in zip(PREFIXES, RESPONSES, strict=True)]
    return {name: tensor[None] for name, tensor in assemble_row(examples, ROW_TOKENS).items()}


def our_step(row: dict[str, torch.Tensor], a: Architecture = ARCHITECTURE) -> Callable[[], float]:
    """Return a function that runs forward and backward of HRMModel on the row and returns the loss."""
    model = HRMModel(hrm_config(a), seed=1).train()

    def step() -> float:
        model.zero_grad(set_to_none=True)
        losses = model(batch=PackedBatch.from_rows(row), bp_steps=BP_STEPS)[0]
        loss = losses.mean()
        loss.backward()
        return loss.item()
    return step


def peer_bp_steps(a: Architecture, bp_steps: int) -> int:
    """Return the number of L ticks with gradient for `bp_steps`; raises ConfigError if transformers has no such
    step."""
    h_bp, l_bp = split_bp_steps(a.h_cycles, a.l_cycles, bp_steps)
    if h_bp != a.h_cycles:
        raise ConfigError(f"bp steps {bp_steps}: transformers' HrmText trains all {a.h_cycles} H ticks; give more "
                          "--bp-steps, or leave --peer out")
    return l_bp


def transformers_step(row: dict[str, torch.Tensor], a: Architecture = ARCHITECTURE, bp_steps: int = BP_STEPS,
                      device: str = "cpu", dtype: torch.dtype = torch.float32) -> Callable[[], float]:
    """Return the same for transformers' HrmText, with the row's dense mask (its only exact way to run packed rows).

    On a GPU the model is compiled.
    """
    row_tokens = row["tokens"].shape[1]
    l_bp = peer_bp_steps(a, bp_steps)
    model = HrmTextForCausalLM(HrmTextConfig(
        vocab_size=a.vocab_size, hidden_size=a.hidden_size, intermediate_size=a.ffn_hidden_size,
        num_hidden_layers=a.num_layers, num_attention_heads=a.num_attention_heads, head_dim=a.head_dim,
        H_cycles=a.h_cycles, L_cycles=a.l_cycles, L_bp_cycles=[0] * (a.h_cycles - 1) + [l_bp],
        initializer_range=a.input_std, max_position_embeddings=row_tokens, pad_token_id=0)).train().to(device, dtype)
    forward = torch.compile(model) if device == "cuda" else model
    batch = PackedBatch.from_rows(row)
    sequences = PrefixSequences(batch.lengths, Rotation.of(batch.position_ids, a.head_dim, a.rope_theta), row_tokens)
    mask = torch.zeros(1, 1, row_tokens, row_tokens, dtype=dtype).masked_fill(~sequences.dense_mask(0), float("-inf"))
    mask, batch = mask.to(device), batch.to(device)
    # transformers shifts the labels itself; ours are already shifted.
    labels = torch.cat([batch.labels.new_full((1, 1), IGNORED_LABEL), batch.labels[:, :-1]], 1)

    def step() -> float:
        model.zero_grad(set_to_none=True)
        loss = forward(input_ids=batch.tokens, attention_mask=mask, position_ids=batch.position_ids, labels=labels,
                     use_cache=False).loss
        loss.backward()
        return float(loss.item())
    return step


def compare_steps(pairs: int, architecture: Architecture) -> float:
    """Alternate both steps; print their times and return the median over the pairs of our time / theirs."""
    row = packed_row()
    steps = {"hrm_megatron": our_step(row, architecture),
             f"transformers {transformers.__version__}": transformers_step(row, architecture)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for pair in range(pairs + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if pair:  # the first warms up
                seconds[name].append(time.perf_counter() - start)
        if pair:
            ours, theirs = (values[-1] for values in seconds.values())
            print(f"pair {pair:2}: {ours:6.2f} s against {theirs:6.2f} s, ratio {ours / theirs:.3f}", flush=True)
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:22} median of {pairs}: {median:.2f} s, {ROW_TOKENS / median:.0f} tokens/s")
    # A machine's speed drifts, so ratios are taken within a pair.
    ratios = sorted(ours / theirs for ours, theirs in zip(*seconds.values(), strict=True))
    print(f"ratio {statistics.median(ratios):.3f}, median of {pairs} pairs from {ratios[0]:.3f} to {ratios[-1]:.3f}")
    return statistics.median(ratios)
