"""Adapters of low rank: the function of merged weights, the gradients of the chain rule, and nothing else trains."""
import dataclasses

import pytest
import torch

from hrm_megatron.config import LORA_TARGETS, LoRA
from tests.model.small import ARCHITECTURE, batch, build, furthest, gradients
from tests.rounding import GRADIENTS, ORDERS, REFERENCE_STATES, of_sums

STATES = 2 * ORDERS * REFERENCE_STATES  # between two models in fp32, whose states reach 4
SOME = ("linear_proj", "linear_fc1")
CASES = {"all": LoRA(3, 6.0), "some": LoRA(5, 5.0, SOME), "full rank": LoRA(ARCHITECTURE.hidden_size, 12.0)}


def adapted(lora):
    """A model whose adapters change it: B is random too."""
    from hrm_megatron.model.lora import adapt

    model = build()
    adapt(model, lora, seed=5)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(".lora.B"):
                weight.copy_(torch.randn(weight.shape, generator=generator) / 10)
    return model


def factors_of(model):
    """A and B by the name of the weight that they change."""
    found = dict(model.named_parameters())
    return {name.replace("lora.B", "weight"): (found[name.replace("lora.B", "lora.A")], b) for name, b in found.items()
            if name.endswith(".lora.B")}


def merged(model, lora):
    """A model of W + alpha / rank B A, all of whose weights train."""
    target, factors, source = build(), factors_of(model), dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in target.named_parameters():
            weight.copy_(source[name])
            if name in factors:
                a, b = factors[name]
                weight.copy_(weight.double() + lora.alpha / lora.rank * b.double() @ a.double())
    return target


@pytest.mark.parametrize("lora", CASES.values(), ids=CASES)
@pytest.mark.parametrize("bp_steps", [2, 5])
def test_gradients_are_those_of_the_chain_rule_through_merged_weights(single_rank, parity, lora, bp_steps):
    model = adapted(lora)
    factors, of_weights = factors_of(model), gradients(merged(model, lora), bp_steps)
    assert {name.split(".")[-2] for name in factors} == {*lora.targets}
    assert len(factors) == len(lora.targets) * 2 * ARCHITECTURE.num_layers
    have = gradients(model, bp_steps)
    scale, wanted = lora.alpha / lora.rank, {}
    for name, (a, b) in factors.items():
        g = of_weights[name].double()
        wanted[name.replace("weight", "lora.A")] = (scale * b.double().t() @ g).float()
        wanted[name.replace("weight", "lora.B")] = (scale * g @ a.double().t()).float()
    assert {name for name, grad in have.items() if grad is not None} == wanted.keys()
    parity(f"LoRA of rank {lora.rank}, {bp_steps} ticks: gradients", furthest(have, wanted), GRADIENTS)


@pytest.mark.parametrize("lora", CASES.values(), ids=CASES)
def test_the_function_is_that_of_merged_weights(single_rank, parity, lora):
    model, rows = adapted(lora), batch()
    with torch.no_grad():
        have, wanted, plain = (each.states(rows) for each in (model, merged(model, lora), build()))
    parity(f"LoRA of rank {lora.rank}: merged weights", (have - wanted).abs().max().item(), STATES)
    assert (have - plain).abs().max() > 0.1


def test_a_decoder_of_a_model_in_training_has_merged_weights(single_rank):
    from hrm_megatron.model.lora import merged_weights

    lora = CASES["some"]
    model = adapted(lora)
    have, wanted = merged_weights(model), merged(model, lora)
    assert have.keys() == {**dict(wanted.named_parameters()), **dict(wanted.named_buffers())}.keys()
    for name, weight in wanted.named_parameters():
        a, b = factors_of(model).get(name, (weight.new_zeros(1, weight.shape[1]), weight.new_zeros(len(weight), 1)))
        terms = weight.abs() + lora.alpha / lora.rank * b.abs() @ a.abs()
        # `scale`, sums of `rank` products, and the last sum.
        assert ((have[name] - weight).abs() <= of_sums(lora.rank + 2, terms)).all(), name


def test_a_rank_of_all_spans_every_change_of_the_weights(single_rank, parity):
    lora = LoRA(ARCHITECTURE.hidden_size, 12.0)
    model, target = adapted(lora), build()
    weights, generator = dict(target.named_parameters()), torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, (a, b) in factors_of(model).items():
            change = torch.randn(weights[name].shape, generator=generator) / 50
            weights[name].add_(change)
            # 2 = rank / alpha; the identity on the side that has `rank` rows or columns.
            wide, narrow = (a, b) if b.shape[0] == lora.rank else (b, a)
            wide.copy_(2 * change)
            narrow.copy_(torch.eye(lora.rank))
        have, wanted = model.states(batch()), target.states(batch())
    parity("LoRA of full rank: any weights", (have - wanted).abs().max().item(), STATES)


def test_it_begins_as_the_model_and_counts_what_it_trains(single_rank):
    from hrm_megatron.model.lora import adapt, without_adapters

    model, lora = build(), LoRA(3, 6.0)
    with torch.no_grad():
        before = model.states(batch())
        adapt(model, lora, seed=5)
        assert torch.equal(model.states(batch()), before)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == lora.num_parameters(ARCHITECTURE)
    one = dataclasses.replace(lora, targets=LORA_TARGETS[:1])
    assert lora.num_parameters(ARCHITECTURE) > one.num_parameters(ARCHITECTURE) == 2 * 2 * 3 * (4 * 24 + 24)
    assert {name.split(".lora.")[-1] for name in model.state_dict() if ".lora." in name} == {"A", "B"}
    with without_adapters([model]):
        assert model.state_dict().keys() == build().state_dict().keys()
    assert [p for p in model.parameters() if p.requires_grad] == trained


def test_layers_that_add_to_the_buffer_look_for_none_of_a_frozen_weight(single_rank, parity):
    lora, names = CASES["some"], []
    model, wanted = adapted(lora), gradients(adapted(lora), 3)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            weight.main_grad = torch.zeros(weight.shape)
            names.append(name)
    for module in model.modules():
        if hasattr(module, "gradient_accumulation_fusion"):
            module.gradient_accumulation_fusion = True
        if hasattr(module, "fusion"):
            module.fusion = True
    gradients(model, 3)
    found = {name: weight.main_grad for name, weight in model.named_parameters() if name in names}
    parity("LoRA, added to the buffer", furthest(found, {name: wanted[name] for name in names}), GRADIENTS)
