"""What torch.compile makes of a step for a Hopper GPU needs no more registers than there are; see hopper.py."""
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINE = re.compile(r"(triton_\S+) +([\d/]+)  ([\d/]+)  ([\d/]+)")
MOST_REGISTERS = 255  # of a thread, by the instruction set: what is more is spilled


@pytest.mark.slow
def test_kernels_of_a_step_spill_no_registers(tmp_path):
    done = subprocess.run([sys.executable, "-W", "ignore", "-m", "tests.fake_cuda.hopper"], cwd=ROOT,
                          capture_output=True, text=True, env=os.environ | {
                              "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr[-3000:]
    compiled, plain = (LINE.findall(part) for part in done.stdout.split("plain layers"))
    print(done.stdout[done.stdout.index("compiled layers"):])
    # Forward and backward of what lies before and behind attention, head and optimizer; norm, gate and SwiGLU.
    for found, parts in ((compiled, ("rsqrt", "silu", "exp", "atan2")), (plain, ("vector_norm", "silu", "sigmoid"))):
        assert all(any(part in name for name, *_ in found) for part in parts), found
    for name, registers, spilled, _ in (*compiled, *plain):
        # A run tries the configurations and takes the fastest: one that does not spill must be among them.
        assert "0" in spilled.split("/"), (name, spilled)
        assert max(map(int, registers.split("/"))) <= MOST_REGISTERS, (name, registers)
