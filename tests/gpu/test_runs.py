"""Deterministic runs, compiled layers, and a step that never waits for the device."""
import contextlib

import numpy as np
import pytest
import torch

from tests.gpu.conftest import SIZES

LOCAL, TE = "local", "transformer_engine"
SMALL = ["--num-layers", 2, "--hidden-size", 64, "--num-attention-heads", 2, "--seq-length", 256, "--micro-batch-size",
         2, "--global-batch-size", 4]
ON_A_GPU = pytest.mark.gpu


@pytest.mark.parametrize("layers", [
    pytest.param([], marks=pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's part"), id="cpu"),
    pytest.param(["--transformer-impl", LOCAL], marks=ON_A_GPU, id=LOCAL),
    pytest.param(["--transformer-impl", TE], marks=ON_A_GPU, id=TE)])
def test_a_deterministic_run_repeats_bitwise(run_on_a_gpu, layers):
    if TE in layers:
        pytest.importorskip("transformer_engine.pytorch")
    first, again = (run_on_a_gpu(*SMALL, "--train-iters", 8, "--deterministic-mode", *layers) for _ in range(2))
    assert first == again and len(first) == 8


@ON_A_GPU
def test_compiled_layers_train_as_local_ones(run_on_a_gpu, parity):
    compiled, plain = (np.array([*run_on_a_gpu(*SIZES, "--train-iters", 60, *flags).values()]).reshape(3, 20).mean(1)
                       for flags in (["--compile-layers"], ["--transformer-impl", LOCAL]))
    # Both are as far from fp32; single steps differ by what is learnt a step earlier or later.
    parity("compiled layers on a GPU: loss, means of 20 steps", float(np.abs(compiled / plain - 1).max()), 0.01)


@contextlib.contextmanager
def waiting_is_an_error(device):
    """On a GPU torch raises where the host would wait for it."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_A_GPU)])
def test_a_micro_batch_never_waits_for_the_device(single_rank, device):
    from hrm_megatron.config import Architecture
    from hrm_megatron.data.batch import PackedBatch, assemble_row
    from hrm_megatron.model.hrm import HRMModel
    from hrm_megatron.training.metrics import loss_sums
    from hrm_megatron.transformer_config import hrm_config

    model = HRMModel(hrm_config(Architecture(2, 64, 2, 96, 250), params_dtype=torch.bfloat16, bf16=True), 1).to(device)
    generator = np.random.default_rng(2)

    def step(lengths):
        row = assemble_row([(generator.integers(1, 250, p), generator.integers(1, 250, r)) for p, r in lengths], 256)
        batch = PackedBatch.from_rows({name: torch.stack([tensor] * 2) for name, tensor in row.items()}).to(device)
        loss, count, report = loss_sums(batch, model(batch=batch, bp_steps=5))
        loss.backward()
        return loss, count, report

    step([(30, 40), (50, 60)])  # kernels and plans are made
    with waiting_is_an_error(device):
        loss, count, report = step([(31, 33), (3, 77), (20, 1)])
    assert count.item() == 2 * (33 + 77 + 1) and report["lm loss"][0].item() == loss.item()
