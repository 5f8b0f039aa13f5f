"""Rows at their edges: padding, empty responses, one example alone, a row exactly full."""
import numpy as np
import pytest
import torch

from hrm_megatron.config import Architecture
from hrm_megatron.data.batch import PackedBatch, assemble_row
from tests.rounding import GRADIENTS, LOSSES

ARCHITECTURE = Architecture(2, 24, 3, 40, 250, h_cycles=2, l_cycles=2)


@pytest.fixture(scope="module")
def model(single_rank):
    from hrm_megatron.model.hrm import HRMModel
    from hrm_megatron.transformer_config import hrm_config

    return HRMModel(hrm_config(ARCHITECTURE), seed=5)


def example(p, r, seed):
    rng = np.random.default_rng(seed)
    return rng.integers(1, 250, p), rng.integers(1, 250, r + 1)


def scores(model, rows):
    stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    model.zero_grad()
    out = model(batch=PackedBatch.from_rows(stacked), bp_steps=4)
    out[0].sum().backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


EXAMPLES = [example(4, 3, 0), example(5, 0, 1), example(1, 6, 2), example(1, 0, 3)]
TOKENS = sum(len(p) + len(t) - 1 for p, t in EXAMPLES)


@pytest.mark.parametrize("row_tokens", [TOKENS, TOKENS + 5], ids=["exactly full", "with padding"])
def test_a_packed_row_scores_as_its_examples_alone(model, row_tokens):
    packed, packed_gradients = scores(model, [assemble_row(EXAMPLES, row_tokens)])
    alone = [scores(model, [assemble_row([one], len(one[0]) + len(one[1]) - 1)]) for one in EXAMPLES]
    assert (packed[0] - torch.cat([losses[0] for losses, _ in alone])).abs().max() < LOSSES
    for name, gradient in packed_gradients.items():
        total = sum(gradients[name] for _, gradients in alone)
        assert (gradient - total).abs().max() <= GRADIENTS * total.abs().max(), name  # sums in another order


def test_padding_and_neighbours_never_reach_the_loss(model):
    row = assemble_row(EXAMPLES[:2], TOKENS)
    other = {name: tensor.clone() for name, tensor in row.items()}
    start = len(EXAMPLES[0][0]) + len(EXAMPLES[0][1]) - 1
    other["tokens"][start:] = 17  # the second example and the padding
    first = len(EXAMPLES[0][1])
    assert torch.equal(scores(model, [row])[0][0, :first], scores(model, [other])[0][0, :first])


def test_several_rows_score_as_one_after_the_other(model):
    rows = [assemble_row(EXAMPLES[:2], 14), assemble_row(EXAMPLES[2:], 14)]
    both, gradients = scores(model, rows)
    one, two = (scores(model, [row]) for row in rows)
    # Labels are counted position by position over the rows: compare sums.
    assert both[0].sum().item() == pytest.approx((one[0][0].sum() + two[0][0].sum()).item(), abs=both.shape[1] * LOSSES)
    for name, gradient in gradients.items():
        total = one[1][name] + two[1][name]
        assert (gradient - total).abs().max() <= GRADIENTS * total.abs().max(), name


def test_an_example_with_one_target_token_has_one_label():
    row = {name: tensor[None] for name, tensor in assemble_row([example(3, 0, 9)], 5).items()}
    batch = PackedBatch.from_rows(row)
    assert batch.lengths == (((3, 0),),)
    assert batch.label_index.tolist() == [2] and batch.num_examples == 1


@pytest.mark.parametrize("bp_steps", [2, 4])
def test_recomputation_loses_no_gradient(model, single_rank, bp_steps):
    from hrm_megatron.model.hrm import HRMModel
    from hrm_megatron.transformer_config import hrm_config

    recomputing = HRMModel(hrm_config(ARCHITECTURE, recompute_granularity="full", recompute_method="uniform",
                                      recompute_num_layers=1), seed=5).train()
    row = {name: tensor[None] for name, tensor in assemble_row(EXAMPLES, TOKENS + 1).items()}
    gradients = []
    for each in (model.train(), recomputing):
        each.zero_grad()
        each(batch=PackedBatch.from_rows(row), bp_steps=bp_steps)[0].sum().backward()
        gradients.append({name: p.grad for name, p in each.named_parameters()})
    for name, want in gradients[0].items():
        have = gradients[1][name]
        assert (have is None) == (want is None), name
        assert want is None or torch.equal(have, want), name
    assert (gradients[0]["embedding.word_embeddings.weight"] is None) == (bp_steps == 2)
