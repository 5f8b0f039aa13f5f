"""The forward pass, and what is summed up on it, against transformers' HrmText and the training code."""
from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import torch
from transformers import HrmTextForCausalLM

from hrm_megatron.convert.hf_files import parts_of
from hrm_megatron.data.batch import assemble_row
from hrm_megatron.generate.load import load_model
from hrm_megatron.quantize.hessians import moments
from hrm_megatron.quantize.recurrence import HEAD, Recurrence, batches, layer_weights
from hrm_megatron.quantize.scores import score

LENGTHS = [[(5, 4), (3, 1)], [(2, 6), (7, 3), (1, 2)]]  # of prefix and target, two rows with padding
ROW_TOKENS = 24


@pytest.fixture(scope="module")
def examples(architecture):
    rng = np.random.default_rng(0)
    return [[tuple(rng.integers(0, architecture.vocab_size, n) for n in pair) for pair in row] for row in LENGTHS]


@pytest.fixture(scope="module")
def rows(architecture, examples):
    found, = batches([assemble_row(row, ROW_TOKENS) for row in examples], architecture, 2, torch.device("cpu"))
    return found


@pytest.fixture(scope="module")
def watched(exported, examples):
    """What transformers does with each example by itself: inputs [n, in] of each linear module, call by call, and the
    logits at the labels."""
    model = HrmTextForCausalLM.from_pretrained(exported)
    inputs, logits = defaultdict(list), []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, given, name=name: inputs[name].append(given[0][0]))
    for row in examples:
        for prefix, target in row:
            with torch.no_grad():
                tokens = torch.tensor([[*prefix, *target[:-1]]])
                types = (torch.arange(tokens.shape[1]) < len(prefix)).long()[None]
                logits.append(model(tokens, token_type_ids=types).logits[0, len(prefix) - 1:])
    return inputs, logits


def test_logits_are_those_of_transformers(architecture, weights, rows, watched):
    model = Recurrence(architecture, weights)
    with torch.no_grad():
        ours = model.label_logits(model.states(rows), rows)
    # Labels are counted position by position over both rows, transformers' row by row.
    order = torch.argsort(rows.batch.label_index % 2, stable=True)
    theirs = torch.cat(watched[1])
    torch.testing.assert_close(ours[order], theirs, rtol=0, atol=2e-5)  # of fp32 sums of 64 over 8 ticks


@pytest.mark.parametrize("first_tick_only", [False, True])
def test_hessians_are_sums_over_ticks_of_what_hooks_in_transformers_see(architecture, weights, rows, watched,
                                                                        first_tick_only):
    ticks = {"L": architecture.h_cycles * architecture.l_cycles, "H": architecture.h_cycles}
    names = [name for stack in "LH" for layer in range(2) for name in layer_weights(stack, layer).values()]
    found = moments(architecture, weights, weights, names, [rows], first_tick_only)
    for name in names:
        calls = watched[0][(parts_of(name) or [name])[0].removesuffix(".weight")]
        each = ticks["L" if ".L_module." in name else "H"]
        assert len(calls) == each * sum(map(len, LENGTHS))  # examples one after the other, ticks within
        seen = torch.cat(calls[::each] if first_tick_only else calls).double()
        expected = seen.t() @ seen
        assert (found[name].hessian - expected).norm() <= 1e-5 * expected.norm()  # inputs are rounded in fp32
        torch.testing.assert_close(found[name].cross, found[name].hessian)


def test_cross_moments_pair_the_models_tick_by_tick(architecture, weights, rows):
    other = {name: tensor + 0.1 if name == HEAD else tensor * (1 + 0.1 * (tensor.dim() == 2))
             for name, tensor in weights.items()}
    names = [layer_weights("L", 1)["mlp.down_proj"]]
    both, = moments(architecture, weights, other, names, [rows]).values()
    own, = moments(architecture, other, other, names, [rows]).values()
    full, = moments(architecture, weights, weights, names, [rows]).values()
    torch.testing.assert_close(both.hessian, own.hessian)
    mirrored, = moments(architecture, other, weights, names, [rows]).values()
    torch.testing.assert_close(both.cross, mirrored.cross.t())
    # |f - x|^2 = |f|^2 + |x|^2 - 2 f x, and the models do differ.
    gap = full.hessian.trace() + own.hessian.trace() - 2 * both.cross.trace()
    assert 0 < gap < 0.5 * full.hessian.trace()


def test_scores_are_those_of_the_training_code(single_rank, architecture, weights, checkpoint_of, rows):
    found = score(architecture, weights, {"same": weights}, [rows])["same"]
    with torch.no_grad():
        losses, right = load_model(checkpoint_of(weights), "raw")(batch=rows.batch)
    assert found.loss == pytest.approx(float(losses.mean()), rel=1e-5)
    examples = [bool(right[rows.batch.label_example == i].all()) for i in range(rows.batch.num_examples)]
    assert found.exact_accuracy == pytest.approx(sum(examples) / len(examples))
    assert found.divergence == 0
    head = weights[HEAD].clone()
    head[rows.batch.flat_labels] += 10 * torch.randn(1, head.shape[1], generator=torch.Generator().manual_seed(1))
    assert score(architecture, weights, {"other": {**weights, HEAD: head}}, [rows])["other"].divergence > 0.01


def test_examples_are_right_where_all_of_their_labels_are(architecture, weights, rows):
    """A head that always answers one token is right exactly where an example's labels are that token."""
    token = int(rows.batch.flat_labels[rows.batch.label_example == 1][0])  # of the example with one label
    model = Recurrence(architecture, weights)
    with torch.no_grad():
        state = model.states(rows).flatten(0, 1)[rows.batch.label_index].mean(0)
    head = torch.zeros_like(weights[HEAD])
    head[token] = state
    states_agree = model.states(rows).flatten(0, 1)[rows.batch.label_index] @ state > 0
    labels, example = rows.batch.flat_labels == token, rows.batch.label_example
    expected = [bool((labels & states_agree)[example == i].all()) for i in range(rows.batch.num_examples)]
    found = score(architecture, weights, {"one": {**weights, HEAD: head}}, [rows])["one"]
    assert found.exact_accuracy == pytest.approx(sum(expected) / len(expected)) and 0 < sum(expected) < len(expected)
