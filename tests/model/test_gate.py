"""Attention without its gate, against one whose gate is 1/2 everywhere: a logit of 0, which twice the output projection
makes up for. Both are exact, so that nothing but the order of sums may differ."""
from __future__ import annotations

import dataclasses

import pytest
import torch

from hrm_megatron.config import Architecture
from tests.model.small import batch, furthest, gradients
from tests.rounding import GRADIENTS, ORDERS, REFERENCE_STATES

UNGATED = Architecture(2, 24, 3, 40, 250, attention_gate="none")
HEADS, WIDTH = UNGATED.num_attention_heads, UNGATED.head_dim


def build(architecture, **settings):
    from hrm_megatron.model.hrm import HRMModel
    from hrm_megatron.transformer_config import hrm_config

    return HRMModel(hrm_config(architecture, **settings), seed=5).train()


def rows_of(weight):
    """[heads, 4, d, h] of a gated projection in Megatron: query, gate, key, value of each head."""
    return weight.view(HEADS, 4, WIDTH, -1)


def half_gated(source):
    """The gated model that is the same function as `source`, which has no gate."""
    architecture = dataclasses.replace(source.config.arch, attention_gate="sigmoid")
    model, weights = build(architecture), dict(source.named_parameters())
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "linear_qkv" in name:
                weight.zero_()
                rows_of(weight)[:, [0, 2, 3]] = weights[name].view(HEADS, 3, WIDTH, -1)
            else:
                weight.copy_(weights[name] * (2 if "linear_proj" in name else 1))
    return model


@pytest.mark.parametrize("placement, settings", [
    ("pre", {}), ("post", {}), ("pre", dict(recompute_granularity="selective", recompute_modules=["core_attn"])),
    ("pre", dict(recompute_gated_act=True))], ids=["direct", "post", "stock", "gated_act"])
def test_states_and_gradients_are_those_of_a_gate_of_one_half(single_rank, parity, placement, settings):
    source = build(dataclasses.replace(UNGATED, norm_placement=placement), **settings)
    gated = half_gated(source)
    with torch.no_grad():
        have, wanted = source.states(batch()), gated.states(batch())
    parity("no gate: states", (have - wanted).abs().max().item(), 2 * ORDERS * REFERENCE_STATES)
    have, of_gated = gradients(source, 3), gradients(gated, 3)
    wanted = {name: rows_of(grad)[:, [0, 2, 3]].reshape(have[name].shape) if "linear_qkv" in name else
              grad * 2 if "linear_proj" in name else grad for name, grad in of_gated.items() if grad is not None}
    parity("no gate: gradients", furthest(have, wanted), GRADIENTS)


def test_its_weights_and_its_work_are_counted(single_rank):
    from hrm_megatron.planner.flops import training_flops
    from hrm_megatron.planner.memory import layer_states

    gated = dataclasses.replace(UNGATED, attention_gate="sigmoid")
    assert sum(p.numel() for p in build(UNGATED).parameters()) == UNGATED.num_parameters
    less = 2 * 2 * 24 * 24  # stacks, layers, the gate's rows
    assert gated.num_parameters - UNGATED.num_parameters == less
    # Of 8 ticks 5 build a graph and cost three times the forward; each runs half of the layers.
    assert training_flops(gated, 5, 7, 2) - training_flops(UNGATED, 5, 7, 2) == (3 + 3 * 5) * 2 * (less // 2) * 7
    assert layer_states(gated) - layer_states(UNGATED) == 2  # the gate, and attention's result behind it
    assert layer_states(gated, True) - layer_states(UNGATED, True) == 1
