"""Small models with Transformer Engine's layers, or local ones, and their gradients. Import it after stub.install()."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from hrm_megatron.config import Architecture
from hrm_megatron.data.batch import PackedBatch
from hrm_megatron.model.hrm import HRMModel
from hrm_megatron.transformer_config import hrm_config

ARCHITECTURE = Architecture(2, 64, 4, 96, 250)
LOCAL, TE = "local", "transformer_engine"
ROW_TOKENS = 64
FP8 = dict(fp8="hybrid", params_dtype=torch.bfloat16, bf16=True, gradient_accumulation_fusion=True)


def build(implementation: str, seed: int = 3, architecture: Architecture = ARCHITECTURE,
          **overrides: Any) -> HRMModel:
    return HRMModel(hrm_config(architecture, transformer_impl=implementation, use_cpu_initialization=True,
                               attention_kernel="sdpa", **overrides), seed)


def batches(count: int) -> Iterator[PackedBatch]:
    """Rows of two examples and some padding."""
    generator = torch.Generator().manual_seed(11)
    for _ in range(count):
        tokens = torch.randint(250, (1, ROW_TOKENS), generator=generator)
        position_ids = torch.cat([torch.arange(23), torch.arange(30), torch.zeros(11, dtype=torch.int64)])[None]
        labels = torch.full_like(tokens, -100)
        labels[0, 9:23], labels[0, 23 + 4:53] = tokens[0, 10:24], tokens[0, 28:54]
        yield PackedBatch.from_rows(dict(
            tokens=tokens, labels=labels, position_ids=position_ids, prefix_lengths=lengths(10, 5),
            response_lengths=lengths(13, 25)))


def lengths(*values: int) -> torch.Tensor:
    return torch.tensor([[*values, *[0] * (ROW_TOKENS - len(values))]])


def with_main_grads(model: HRMModel) -> HRMModel:
    """Give every weight what Megatron's DDP gives it."""
    for weight in model.parameters():
        weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
        weight.grad_added_to_main_grad = False
    return model


def gradients(model: HRMModel, count: int = 2, bp_steps: int = 5) -> dict[str, torch.Tensor]:
    """Run a step of `count` micro-batches as the schedule does: fp32 gradients by name."""
    for number, batch in enumerate(batches(count)):
        if not number:
            model.set_is_first_microbatch()
        model(batch=batch, bp_steps=bp_steps)[0].sum().backward()
    return {name: weight.main_grad if getattr(weight, "grad_added_to_main_grad", False) else weight.grad
            for name, weight in model.named_parameters()}


def furthest(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Largest error of any tensor, of its largest element."""
    return max(float((ours[n] - theirs[n]).abs().max() / theirs[n].abs().max()) for n in theirs)
