"""Activations that leave the device, or are made again: how many are left, and whether the gradients are right.

What a CPU can tell is in tests/te and tests/layers/test_gated_recompute.py.
"""
import numpy as np
import pytest
import torch

from tests.gpu.conftest import relative

pytestmark = pytest.mark.gpu
ROW_TOKENS, LAYERS, HIDDEN, FFN = 8192, 4, 256, 768
EXAMPLES = [(500, 1500), (30, 2000), (1000, 1), (100, 3000)]


@pytest.fixture
def step(single_rank):
    """Run a step of one micro-batch: gradients by name, and bytes that the forward left on the device."""
    from hrm_megatron.config import Architecture
    from hrm_megatron.data.batch import PackedBatch, assemble_row
    from hrm_megatron.model.hrm import HRMModel
    from hrm_megatron.transformer_config import hrm_config

    generator = np.random.default_rng(5)
    examples = [(generator.integers(1000, size=p), generator.integers(1000, size=r + 1)) for p, r in EXAMPLES]
    rows = assemble_row(examples, ROW_TOKENS)
    batch = PackedBatch.from_rows({name: tensor[None] for name, tensor in rows.items()}).to("cuda")

    def run(bp_steps, layers="transformer_engine", **settings):
        if layers == "transformer_engine":
            pytest.importorskip("transformer_engine.pytorch")
        model = HRMModel(hrm_config(Architecture(LAYERS, HIDDEN, 4, FFN, 1000), transformer_impl=layers,
                                    params_dtype=torch.bfloat16, bf16=True, **settings), seed=3).cuda()
        model(batch=batch, bp_steps=bp_steps)[0].sum().backward()  # kernels, plans and workspaces
        model.zero_grad()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        losses = model(batch=batch, bp_steps=bp_steps)[0]
        kept = torch.cuda.memory_allocated() - before
        losses.sum().backward()
        return {name: weight.grad for name, weight in model.named_parameters()}, kept
    return run


def furthest(have, wanted):
    """Largest error of a gradient, of its norm."""
    for name, want in wanted.items():
        assert (want is None) == (have[name] is None), name
    return max(relative(have[name], want) for name, want in wanted.items() if want is not None)


@pytest.mark.parametrize("bp_steps", [2, 5, 8])
def test_layers_leave_the_device_and_come_back(step, parity, bp_steps):
    pytest.importorskip("transformer_engine.pytorch", minversion="2.10")
    wanted, all_bytes = step(bp_steps)
    for layers in range(1, LAYERS):
        have, kept = step(bp_steps, cpu_offloading=True, cpu_offloading_num_layers=layers)
        # Of each tick stay the last layers, the norm at its exit and the sums of states between: half a layer's worth.
        assert kept < all_bytes * (LAYERS - layers + 0.5) / LAYERS
        # Atomic sums in bf16: 2^-9 of each.
        parity(f"{layers} layers offloaded, bp {bp_steps}: gradients", furthest(have, wanted), 1e-2)


@pytest.mark.parametrize("layers", ["local", "transformer_engine"])
@pytest.mark.parametrize("bp_steps", [2, 5, 8])
def test_gated_activations_are_recomputed(step, parity, bp_steps, layers):
    wanted, all_bytes = step(bp_steps, layers)
    have, kept = step(bp_steps, layers, recompute_gated_act=True)
    products = bp_steps * LAYERS * ROW_TOKENS * (HIDDEN + FFN) * 2
    assert all_bytes - kept == pytest.approx(products, rel=0.02)  # blocks of the allocator are rounded up
    # Other kernels than Megatron's, each rounding once to bf16, 2^-9, in every layer of every tick.
    parity(f"gated_act recomputed, {layers}, bp {bp_steps}: gradients", furthest(have, wanted), 2e-2)
