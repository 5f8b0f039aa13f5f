"""Products with gates that are dropped and filled again: the same gradients, less memory."""
from functools import partial

import pytest
import torch

from hrm_megatron.config import Architecture
from hrm_megatron.data.batch import PackedBatch, assemble_row
from tests.model.kept import kept_bytes

ARCHITECTURE = Architecture(2, 24, 3, 40, 250)
TARGETS = [(range(1, 5), range(4)), (range(3, 8), range(1)), (range(1, 2), range(9, 16))]
ROW_TOKENS = sum(len(p) + len(t) - 1 for p, t in TARGETS) + 1
PER_STEP = 2 * 2  # products: in each layer one of attention, one of the MLP


@pytest.fixture(scope="module")
def build(single_rank):
    from hrm_megatron.model.hrm import HRMModel
    from hrm_megatron.model.hrm_config import hrm_config

    return lambda **settings: HRMModel(hrm_config(ARCHITECTURE, **settings), seed=5).train()


@pytest.fixture
def alive(monkeypatch):
    """All products of a run, and how many have memory whenever one is filled."""
    from hrm_megatron.model import products

    class Watched(products.DroppedProduct):
        made, filled = [], []

        def of(self, *factors):
            self.made.append(self)
            return super().of(*factors)

        def fill(self, grad):
            super().fill(grad)
            self.filled.append(sum(one.product.untyped_storage().nbytes() > 0 for one in self.made))
    monkeypatch.setattr(products, "DroppedProduct", Watched)
    return Watched


def batch():
    return PackedBatch.from_rows({name: tensor[None] for name, tensor in assemble_row(TARGETS, ROW_TOKENS).items()})


def gradients(model, bp_steps):
    model(batch=batch(), bp_steps=bp_steps)[0].sum().backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("settings", [
    {}, dict(recompute_ticks=2), dict(recompute_granularity="selective", recompute_modules=["core_attn"]),
    dict(recompute_granularity="selective", recompute_modules=["mlp"])], ids=["alone", "ticks", "core_attn", "mlp"])
@pytest.mark.parametrize("bp_steps", [2, 5, 8])
def test_gradients_are_those_without(build, parity, bp_steps, settings):
    wanted, worst = gradients(build(), bp_steps), 0.0
    have = gradients(build(recompute_products=True, **settings), bp_steps)
    for name, want in wanted.items():
        assert (have[name] is None) == (want is None), name
        if want is not None:
            worst = max(worst, ((have[name] - want).abs().max() / want.abs().max()).item())
    # SwiGLU's own backward multiplies in another order.
    parity(f"products dropped, {settings or 'alone'}, bp {bp_steps}: gradients", worst, 1e-6)


@pytest.mark.parametrize("bp_steps", [2, 5, 8])
def test_one_product_at_a_time_has_memory(build, alive, bp_steps):
    model = build(recompute_products=True)
    scores = model(batch=batch(), bp_steps=bp_steps)[0]
    assert len(alive.made) == 8 * PER_STEP
    assert not any(one.product.untyped_storage().nbytes() for one in alive.made)
    scores.sum().backward()
    assert alive.filled == [1] * bp_steps * PER_STEP
    assert not any(one.product.untyped_storage().nbytes() for one in alive.made)
    assert [one.factors for one in alive.made[-bp_steps * PER_STEP:]] == [()] * bp_steps * PER_STEP


def test_a_product_is_no_longer_kept(build):
    rows, kept = batch(), []
    for dropped in (False, True):
        model = build(recompute_products=dropped)
        sequences = model.sequences(rows)
        shared = [*model.parameters(), *vars(sequences.rotation).values()]
        kept.append(kept_bytes(partial(model, batch=rows, bp_steps=5, sequences=sequences), shared))
    # SwiGLU's and the gate's results; and on a CPU each function's own copy of silu and, in fp32, of the sigmoid, in
    # place of which the gate itself is kept.
    per_layer = ROW_TOKENS * (ARCHITECTURE.ffn_hidden_size + ARCHITECTURE.hidden_size + ARCHITECTURE.ffn_hidden_size)
    print(f"{kept[0]} bytes kept, {kept[1]} without products")
    assert kept[0] - kept[1] == 5 * 2 * per_layer * 4


def test_a_gate_does_not_keep_queries_keys_and_values(build):
    attention = build().l_stack.layers[0].self_attention
    *_, gate = attention.get_query_key_value_tensors(torch.randn(ROW_TOKENS, 1, ARCHITECTURE.hidden_size), None,
                                                     split_qkv=True, output_gate=True)
    assert gate.untyped_storage().nbytes() == gate.nbytes == ROW_TOKENS * ARCHITECTURE.hidden_size * 4
