"""Time one training step against another implementation of the same model, in the same process and run.

    python tools/benchmark.py step      # fp32 on the CPU, against transformers' HrmText
"""
from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable

from hrm_megatron.parallel.cpu import activate

activate()

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import HrmTextConfig, HrmTextForCausalLM  # noqa: E402

from hrm_megatron.config import Architecture, ffn_hidden_size  # noqa: E402
from hrm_megatron.data.batch import IGNORED_LABEL, PackedBatch, assemble_row  # noqa: E402
from hrm_megatron.model.hrm import HRMModel  # noqa: E402
from hrm_megatron.model.hrm_config import hrm_config  # noqa: E402
from hrm_megatron.model.prefix_lm import PrefixSequences  # noqa: E402
from hrm_megatron.model.rotary import Rotation  # noqa: E402
from hrm_megatron.model.schedule import split_bp_steps  # noqa: E402
from hrm_megatron.parallel.single import single_rank  # noqa: E402

ROW_TOKENS = 2048
BP_STEPS = 5
ARCHITECTURE = Architecture(num_layers=4, hidden_size=512, num_attention_heads=8, ffn_hidden_size=ffn_hidden_size(512),
                            vocab_size=4096)
PREFIXES = (96, 160, 64, 128, 200, 80, 112, 100)  # eight examples fill the row
RESPONSES = (160, 96, 192, 128, 56, 176, 144, 156)


def packed_row(seed: int = 0) -> dict[str, torch.Tensor]:
    """One full row of random tokens, [1, s] each."""
    rng = np.random.default_rng(seed)
    examples = [(rng.integers(1, ARCHITECTURE.vocab_size, p), rng.integers(1, ARCHITECTURE.vocab_size, r + 1))
                for p, r in zip(PREFIXES, RESPONSES, strict=True)]
    return {name: tensor[None] for name, tensor in assemble_row(examples, ROW_TOKENS).items()}


def our_step(row: dict[str, torch.Tensor]) -> Callable[[], float]:
    """Forward and backward of HRMModel, from the row's tensors to the gradients."""
    model = HRMModel(hrm_config(ARCHITECTURE), seed=1).train()

    def step() -> float:
        model.zero_grad(set_to_none=True)
        losses = model(batch=PackedBatch.from_rows(row), bp_steps=BP_STEPS)[0]
        loss = losses.mean()
        loss.backward()
        return loss.item()
    return step


def transformers_step(row: dict[str, torch.Tensor]) -> Callable[[], float]:
    """Forward and backward of transformers' HrmText on the same row, with the row's mask (its only exact way)."""
    a = ARCHITECTURE
    h_bp, l_bp = split_bp_steps(a.h_cycles, a.l_cycles, BP_STEPS)
    assert h_bp == a.h_cycles, "transformers always trains all H ticks"
    model = HrmTextForCausalLM(HrmTextConfig(
        vocab_size=a.vocab_size, hidden_size=a.hidden_size, intermediate_size=a.ffn_hidden_size,
        num_hidden_layers=a.num_layers, num_attention_heads=a.num_attention_heads, head_dim=a.head_dim,
        H_cycles=a.h_cycles, L_cycles=a.l_cycles, L_bp_cycles=[0] * (a.h_cycles - 1) + [l_bp],
        initializer_range=a.input_std, max_position_embeddings=ROW_TOKENS, pad_token_id=0)).train()
    batch = PackedBatch.from_rows(row)
    sequences = PrefixSequences(batch.lengths, Rotation.of(batch.position_ids, a.head_dim, a.rope_theta), ROW_TOKENS)
    mask = torch.zeros(1, 1, ROW_TOKENS, ROW_TOKENS).masked_fill(~sequences.dense_mask(0), float("-inf"))
    # transformers shifts labels by one itself; ours are already shifted.
    labels = torch.cat([torch.full((1, 1), IGNORED_LABEL), batch.labels[:, :-1]], 1)

    def step() -> float:
        model.zero_grad(set_to_none=True)
        loss = model(input_ids=batch.tokens, attention_mask=mask, position_ids=batch.position_ids, labels=labels,
                     use_cache=False).loss
        loss.backward()
        return float(loss.item())
    return step


def compare_steps(repeats: int) -> float:
    """Alternate both steps, print the medians and return ours over theirs."""
    row = packed_row()
    steps = {"hrm_megatron": our_step(row), f"transformers {transformers.__version__}": transformers_step(row)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            loss = step()
            if repeat:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
                print(f"{name:22} {seconds[name][-1]:7.2f} s  (loss {loss:.3f})", flush=True)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, median in medians.items():
        print(f"{name:22} median of {repeats}: {median:.2f} s, {ROW_TOKENS / median:.0f} tokens/s")
    ours, theirs = medians.values()
    print(f"ratio {ours / theirs:.3f}")
    return ours / theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    step = commands.add_parser("step", help="one training step, fp32 on the CPU, against transformers' HrmText")
    step.add_argument("--repeats", type=int, default=5)
    step.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sizes = ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(ARCHITECTURE).items() if value)
    print(f"torch {torch.__version__}, {args.threads} thread(s); {ROW_TOKENS} packed tokens, bp {BP_STEPS}; {sizes}")
    with single_rank():
        compare_steps(args.repeats)


if __name__ == "__main__":
    main()
