"""Gated activations that are recomputed: the same gradients, less memory."""
from functools import partial

import pytest
import torch

from tests.model.small import ARCHITECTURE, ROW_TOKENS, batch, build, furthest, gradients, kept_bytes
from tests.rounding import GRADIENTS

PER_STEP = 2 * 2  # products: in each layer one of attention, one of the MLP


@pytest.fixture
def alive(monkeypatch):
    """All products of a run, and how many have memory whenever one is recomputed."""
    from hrm_megatron.layers import gated_recompute

    class Watched(gated_recompute.DiscardedOutput):
        made, recomputed = [], []

        def of(self, *factors):
            self.made.append(self)
            return super().of(*factors)

        def recompute(self, grad):
            super().recompute(grad)
            self.recomputed.append(sum(one.product.untyped_storage().nbytes() > 0 for one in self.made))
    monkeypatch.setattr(gated_recompute, "DiscardedOutput", Watched)
    return Watched


@pytest.mark.parametrize("settings", [
    {}, dict(recompute_ticks=2), dict(recompute_granularity="selective", recompute_modules=["core_attn"]),
    dict(recompute_granularity="selective", recompute_modules=["mlp"])], ids=["alone", "ticks", "core_attn", "mlp"])
@pytest.mark.parametrize("bp_steps", [2, 5, 8])
def test_gradients_are_those_without(single_rank, parity, bp_steps, settings):
    have = gradients(build(recompute_gated_act=True, **settings), bp_steps)
    worst = furthest(have, gradients(build(), bp_steps))
    # SwiGLU's own backward multiplies in another order.
    parity(f"gated_act recomputed, {settings or 'alone'}, bp {bp_steps}: gradients", worst, GRADIENTS)


@pytest.mark.parametrize("bp_steps", [2, 5, 8])
def test_one_product_at_a_time_has_memory(single_rank, alive, bp_steps):
    model = build(recompute_gated_act=True)
    scores = model(batch=batch(), bp_steps=bp_steps)[0]
    assert len(alive.made) == 8 * PER_STEP
    assert not any(one.product.untyped_storage().nbytes() for one in alive.made)
    scores.sum().backward()
    assert alive.recomputed == [1] * bp_steps * PER_STEP
    assert not any(one.product.untyped_storage().nbytes() for one in alive.made)
    assert [one.factors for one in alive.made[-bp_steps * PER_STEP:]] == [()] * bp_steps * PER_STEP


def test_a_product_is_no_longer_kept(single_rank):
    rows, kept = batch(), []
    for dropped in (False, True):
        model = build(recompute_gated_act=dropped)
        sequences = model.sequences(rows)
        shared = [*model.parameters(), *vars(sequences.rotation).values()]
        kept.append(kept_bytes(partial(model, batch=rows, bp_steps=5, sequences=sequences), shared))
    # SwiGLU's and the gate's results; and on a CPU a copy of the sigmoid in fp32, in place of which the gate is kept.
    per_layer = ROW_TOKENS * (ARCHITECTURE.ffn_hidden_size + ARCHITECTURE.hidden_size)
    print(f"{kept[0]} bytes kept, {kept[1]} without products")
    assert kept[0] - kept[1] == 5 * 2 * per_layer * 4


def test_a_gate_does_not_keep_queries_keys_and_values(single_rank):
    attention = build().l_stack.layers[0].self_attention
    *_, gate = attention.get_query_key_value_tensors(torch.randn(ROW_TOKENS, 1, ARCHITECTURE.hidden_size), None,
                                                     split_qkv=True, output_gate=True)
    assert gate.untyped_storage().nbytes() == gate.nbytes == ROW_TOKENS * ARCHITECTURE.hidden_size * 4
