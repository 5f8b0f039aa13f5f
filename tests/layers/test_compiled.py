"""Compiled layers against plain ones, in a process where torch.compile works without CUDA too.

By the traced operations (aot_eager: forward and backward graphs as on a GPU, kernels as written), and with a C++
compiler by generated kernels.
"""
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Of a tensor's gradient (2-norm). fp32: another order of sums. bf16: a compiler keeps fp32 between the operations that
# it joins where plain layers round to 2^-9; each side is as far as that from fp32 (measured 0.011).
TOLERANCES = {"float32": 3e-6, "bfloat16": 3e-2}


def compare(dtype, backend):
    """Print the largest differences over micro-batches of different examples and all bp, and the graphs compiled."""
    import functools
    import json
    import os

    import torch

    from hrm_megatron.parallel.cpu import activate

    torch.compile = functools.partial(torch.compile, backend=backend)  # also of what Megatron and the head compile

    activate()
    del os.environ["TORCHDYNAMO_DISABLE"]

    import numpy as np
    from torch._dynamo.testing import CompileCounterWithBackend

    from hrm_megatron.config import Architecture
    from hrm_megatron.data.batch import PackedBatch, assemble_row
    from hrm_megatron.layers import compiled
    from hrm_megatron.model.hrm import HRMModel
    from hrm_megatron.parallel.single import single_rank
    from hrm_megatron.transformer_config import hrm_config

    counter = CompileCounterWithBackend(backend)
    compiled.CompiledLayer.before, compiled.CompiledLayer.behind = (staticmethod(
        torch.compile(part, backend=counter)) for part in (compiled.before_attention, compiled.behind_attention))
    precision = dict(params_dtype=getattr(torch, dtype), bf16=dtype == "bfloat16")
    generator = np.random.default_rng(3)

    def rows_of(examples):
        lengths = generator.integers(1, 20, (examples, 2))
        return assemble_row([[generator.integers(1, 250, n) for n in pair] for pair in lengths], 96)

    def step(model, batch, bp_steps):
        for weight in model.parameters():
            weight.grad, weight.main_grad = None, torch.zeros_like(weight, dtype=torch.float32)
            weight.grad_added_to_main_grad = False
        losses = model(batch=batch, bp_steps=bp_steps)[0]
        losses.mean().backward()
        return losses.detach(), {
            name: weight.main_grad if weight.grad_added_to_main_grad else weight.grad
            for name, weight in model.named_parameters()}

    found = dict(loss=0.0, gradient=0.0, graphs=[], evaluated=[])
    with single_rank():
        plain, ours = (HRMModel(hrm_config(Architecture(2, 32, 4, 48, 250), gradient_accumulation_fusion=True,
                                           compile_layers=on, **precision), 1) for on in (False, True))
        for examples in (1, 2, 1):
            rows = [rows_of(examples) for _ in range(2)]
            batch = PackedBatch.from_rows({name: torch.stack([row[name] for row in rows]) for name in rows[0]})
            for bp_steps in (5, 2, 8):
                (losses, gradients), (wanted, exact) = (step(model, batch, bp_steps) for model in (ours, plain))
                found["loss"] = max(found["loss"], (losses - wanted).abs().max().item())
                for name, gradient in gradients.items():
                    assert (gradient is None) == (exact[name] is None) == (bp_steps == 2 and "embedding" in name), name
                    if gradient is not None:
                        error = ((gradient - exact[name]).norm() / exact[name].norm()).item()
                        found["gradient"] = max(found["gradient"], error)
                found["graphs"].append(counter.frame_count)
            with torch.no_grad():
                losses, wanted = (model.eval()(batch=batch)[0] for model in (ours, plain))
                found["loss"] = max(found["loss"], (losses - wanted).abs().max().item())
                found["evaluated"].append(counter.frame_count)
                for model in (plain.train(), ours.train()):
                    for weight in model.parameters():
                        weight.mul_(0.9)
    print(json.dumps(found))


@pytest.mark.parametrize("dtype, backend", [
    ("float32", "aot_eager"), pytest.param("bfloat16", "aot_eager", marks=pytest.mark.slow),
    pytest.param("bfloat16", "inductor", marks=[pytest.mark.slow, pytest.mark.skipif(
        shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")])])
def test_compiled_layers_train_as_plain_ones(parity, tmp_path, dtype, backend):
    program = f"{inspect.getsource(compare)}\ncompare({dtype!r}, {backend!r})"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
                                            "TORCHINDUCTOR_COMPILE_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    parity(f"compiled layers, {dtype}, {backend}: losses", found["loss"], 5e-2 if dtype == "bfloat16" else 1e-5)
    parity(f"compiled layers, {dtype}, {backend}: gradients", found["gradient"], TOLERANCES[dtype])
    # Once for all layers, stacks, ticks and micro-batches: what is compiled is so within the first two steps, the first
    # evaluation, and the step after it.
    graphs, evaluated = found["graphs"], found["evaluated"]
    assert 0 < graphs[1] == graphs[2] < evaluated[0] <= graphs[3] == graphs[-1] == evaluated[-1] < 24, found
