"""Activations in the host's memory: what leaves the device, and what comes back. What a CPU can tell is in tests/te."""
import numpy as np
import pytest
import torch

pytestmark = pytest.mark.gpu
ROW_TOKENS, LAYERS = 8192, 4
EXAMPLES = [(500, 1500), (30, 2000), (1000, 1), (100, 3000)]


@pytest.fixture
def step(single_rank):
    """Run a step of one micro-batch: gradients by name, and bytes that the forward left on the device."""
    pytest.importorskip("transformer_engine.pytorch", minversion="2.10")
    from hrm_megatron.config import Architecture
    from hrm_megatron.data.batch import PackedBatch, assemble_row
    from hrm_megatron.model.hrm import HRMModel
    from hrm_megatron.model.hrm_config import hrm_config

    generator = np.random.default_rng(5)
    examples = [(generator.integers(1000, size=p), generator.integers(1000, size=r + 1)) for p, r in EXAMPLES]
    rows = assemble_row(examples, ROW_TOKENS)
    batch = PackedBatch.from_rows({name: tensor[None] for name, tensor in rows.items()}).to("cuda")

    def run(offloaded_layers, bp_steps):
        model = HRMModel(hrm_config(
            Architecture(LAYERS, 256, 4, 768, 1000), transformer_impl="transformer_engine", params_dtype=torch.bfloat16,
            bf16=True, cpu_offloading=offloaded_layers > 0, cpu_offloading_num_layers=offloaded_layers), seed=3).cuda()
        model(batch=batch, bp_steps=bp_steps)[0].sum().backward()  # kernels, plans and workspaces
        model.zero_grad()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        losses = model(batch=batch, bp_steps=bp_steps)[0]
        kept = torch.cuda.memory_allocated() - before
        losses.sum().backward()
        return {name: weight.grad for name, weight in model.named_parameters()}, kept
    return run


@pytest.mark.parametrize("bp_steps", [2, 5, 8])
def test_layers_leave_the_device_and_come_back(step, parity, bp_steps):
    wanted, all_bytes = step(0, bp_steps)
    for layers in range(1, LAYERS):
        have, kept = step(layers, bp_steps)
        # Of each tick stay the last layers, the norm at its exit and the sums of states between: half a layer's worth.
        assert kept < all_bytes * (LAYERS - layers + 0.5) / LAYERS
        for name, want in wanted.items():
            assert (want is None) == (have[name] is None), name
        worst = max(float((have[n].float() - w.float()).norm() / w.float().norm())
                    for n, w in wanted.items() if w is not None)
        parity(f"{layers} layers offloaded, bp {bp_steps}: gradients", worst, 1e-2)  # atomic sums in bf16: 2^-9 of each
