"""The update as a compiled kernel against the plain one, in a process where torch.compile works without CUDA too."""
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHAPES = [(37, 5), (1001,), (64, 33), (0,), (7,), (129,)]


def forty_steps(shapes):
    """Train copies of the same weights by both; print the differences, graphs after one step and at last, kernels."""
    import json

    import torch
    from torch._dynamo.utils import counters
    from torch._inductor import metrics

    from hrm_megatron.optim.adam_atan2 import STATE_KEYS, AdamATan2, fused_update, update

    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    copies = [[torch.nn.Parameter(p.clone()) for p in start] for _ in range(2)]
    for copy in copies:
        copy[5].grad_dtype = torch.bfloat16
    plain, fused = (AdamATan2(copy, 0.0, ema_decay=0.9) for copy in copies)
    plain.update, fused.update = update, fused_update()
    for step in range(40):
        for i, pair in enumerate(zip(*copies, strict=True)):
            grad = torch.randn(pair[0].shape, generator=generator) * 10.0 ** (step % 7 - 3)  # seven orders of magnitude
            grad[::3] = 0.0  # never a gradient: decay alone
            for p in pair:
                p.grad = None if i == 4 and step % 2 else grad.to(p.grad_dtype)
        for optimizer in (plain, fused):
            optimizer.param_groups[0]["lr"] = 0.02 * min(1, (step + 1) / 10)
            optimizer.step()
        if not step:
            first_graphs = counters["stats"]["unique_graphs"]
    differences = {}
    for name in ("p", *STATE_KEYS):
        pairs = [(a, b) if name == "p" else (plain.state[a][name], fused.state[b][name])
                 for a, b in zip(*copies, strict=True)]
        differences[name] = max(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs if a.numel())
    still = all(torch.equal(a[::3], b[::3]) for a, b in zip(*copies, strict=True))
    moved = min((a - b).abs().max().item() for a, b in zip(copies[1], start, strict=True) if b.numel())
    print(json.dumps(dict(differences=differences, still=still, moved=moved, first_graphs=first_graphs,
                          graphs=counters["stats"]["unique_graphs"], kernels=metrics.generated_kernel_count)))


@pytest.mark.slow  # half a minute of compiling
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_one_kernel_for_all_steps_does_what_the_plain_update_does(parity, tmp_path):
    program = f"{inspect.getsource(forty_steps)}\nforty_steps({SHAPES})"
    environment = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True,
                          env=environment | {"PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
                               "TORCHINDUCTOR_COMPILE_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    for name, difference in found["differences"].items():
        # Rounding errors of 40 steps: the compiler fuses products with sums and computes atan2 and roots by itself.
        parity(f"fused AdamATan2, 40 steps: {name}", difference, 2e-6)
    assert found["still"] and found["moved"] > 0.1
    # By axes (1 or 2) and the gradient's dtype; not by sizes, rates or counts.
    assert found["first_graphs"] == found["graphs"] == found["kernels"] == 3
