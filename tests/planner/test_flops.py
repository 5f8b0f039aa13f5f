"""The count of operations, against the published one and against torch's counter."""
import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hrm_megatron.config import PRESETS, Architecture, LoRA
from hrm_megatron.planner.flops import score_elements, training_flops


def test_a_token_of_xl_costs_what_is_published():
    xl = PRESETS["XL"]
    architecture = Architecture(xl.num_layers, xl.hidden_size, xl.num_attention_heads, xl.ffn_hidden_size, 65_536)
    published_gflops = 18.27  # per token, arXiv 2605.20613
    assert training_flops(architecture, 5, 1000, 1000) / 1e12 == pytest.approx(published_gflops, abs=0.005)


@pytest.mark.parametrize("lengths", [[(3, 4)], [(1, 0), (5, 2), (2, 9)]])
def test_pairs_are_those_of_the_mask(single_rank, lengths):
    from hrm_megatron.attention.prefix_lm import PrefixSequences

    assert score_elements(lengths) == PrefixSequences([lengths], None, 40).dense_mask(0).sum()


@pytest.mark.parametrize("bp_steps, lora, gate", [
    (2, None, "sigmoid"), (4, None, "sigmoid"), (8, None, "none"), (4, LoRA(3, 3.0), "sigmoid"),
    (2, LoRA(5, 5.0, ("linear_qkv", "linear_fc2")), "none")])
def test_products_are_those_that_torch_counts(single_rank, monkeypatch, bp_steps, lora, gate):
    """Of a whole forward and backward, but for attention, which torch counts in no kernel of ours."""
    from hrm_megatron.data.batch import PackedBatch, assemble_row
    from hrm_megatron.model.hrm import HRMModel
    from hrm_megatron.model.lora import adapt
    from hrm_megatron.parallel import processor
    from hrm_megatron.transformer_config import hrm_config

    monkeypatch.setattr(processor, "ON_ONEDNN", False)  # whose matmuls torch does not count
    architecture = Architecture(3, 24, 2, 40, 250, attention_gate=gate)
    rng = np.random.default_rng(5)
    examples = [(rng.integers(1, 250, p), rng.integers(1, 250, r)) for p, r in ((5, 7), (9, 4))]
    batch = PackedBatch.from_rows({name: tensor[None] for name, tensor in assemble_row(examples, 29).items()})
    model = HRMModel(hrm_config(architecture), seed=1).train()
    if lora:
        adapt(model, lora, seed=1)
    with FlopCounterMode(display=False) as counter:
        model(batch=batch, bp_steps=bp_steps)[0].sum().backward()
    counted = counter.get_flop_counts()["Global"]
    matmuls = sum(counted.get(operator, 0) for operator in (torch.ops.aten.mm, torch.ops.aten.addmm))
    ours = training_flops(architecture, bp_steps, batch.tokens.numel(), len(batch.label_index), lora=lora)
    # At bp 2, and where the embedding is frozen, no gradient is wanted of the first gradient tick's input: its first
    # matmul has no such backward, nor has the adapter beside it.
    rows = architecture.linear_shapes["linear_qkv"][0] + (lora.rank if lora else 0)
    unwanted = 2 * 24 * rows * 29 if bp_steps == 2 or lora else 0
    # Gradient of the head's weight, if it has one: torch does not count addmm_.
    in_place = 0 if lora else 2 * 24 * 256 * len(batch.label_index)
    assert matmuls == ours - unwanted - in_place
