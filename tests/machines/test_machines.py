"""Parts of the suite as another machine would run them: other kernels, and what else a process inherits.

All of it under each would take hours. Kernels change digits, so they meet the tests that compare digits: every kernel,
the whole model against formulas in fp64, the golden numbers and transformers, the optimizer's forty steps, and one run
through Megatron's loop. What is inherited changes how files, programs and children behave, so that meets the tests that
write files, call tools and end processes.
"""
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]  # each is minutes of the suite
ROOT = Path(__file__).parents[2]
DIGITS = ["tests/layers", "tests/attention", "tests/model", "tests/optim", "tests/planner", "tests/convert",
          "tests/generate/test_decode.py", "tests/gpu/test_loss_and_update.py", "tests/gpu/test_attention_kernels.py",
          "tests/parallel/test_patches.py", "tests/training/test_fullbatch.py"]
PROCESSES = ["tests/house", "tests/data", "tests/checkpoint", "tests/convert", "tests/demo", "tests/examples",
             "tests/launch_scripts", "tests/generate", "tests/parallel/test_patches.py", "tests/test_program.py",
             *(f"tests/training/test_{name}.py" for name in ("bad_input", "console", "death", "file_modes", "going_on",
                                                             "resume", "start"))]
KERNELS = {  # libraries take the best that the processor has and the variable allows
    "no vectors": dict(ATEN_CPU_CAPABILITY="default", ONEDNN_MAX_CPU_ISA="SSE41", MKL_ENABLE_INSTRUCTIONS="SSE4_2"),
    "AVX2": dict(ATEN_CPU_CAPABILITY="avx2", ONEDNN_MAX_CPU_ISA="AVX2", MKL_ENABLE_INSTRUCTIONS="AVX2"),
    "AVX-512 without AMX": dict(ONEDNN_MAX_CPU_ISA="AVX512_CORE", MKL_ENABLE_INSTRUCTIONS="AVX512"),
    "MKL for every maker": dict(MKL_CBWR="COMPATIBLE"),
    "oneDNN's products": dict(PRODUCTS="onednn"),
    "MKL's products": dict(PRODUCTS="mkl"),
    "no oneDNN": dict(PRODUCTS="without onednn"),
}
IN_THE_BACKGROUND = ["sh", "-c", "trap '' INT QUIT HUP; exec \"$@\"", "sh"]
PRIVATE = ["sh", "-c", "umask 077; exec \"$@\"", "sh"]
READ_ONLY = ["unshare", "--mount", "--map-root-user", "sh", "-c",
             f"mount --bind '{ROOT}' '{ROOT}' && mount -o remount,bind,ro '{ROOT}' && cd '{ROOT}' && exec \"$@\"", "sh"]
INHERITED = {  # what starts the tests, and variables; None: not set
    "SIGINT ignored": (IN_THE_BACKGROUND, {}),
    "umask 077": (PRIVATE, {}),
    "locale C": ([], dict(LC_ALL="C", LANG="C")),
    "no HOME": ([], dict(HOME=None, XDG_CACHE_HOME=None, USER=None, LOGNAME=None)),
    "read-only tree": (READ_ONLY, {}),
}


def passes(parts, starter=(), **variables):
    """Run these parts of the suite as the default run would."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    plugin = ["-p", "tests.machines.products"] if "PRODUCTS" in variables else []
    done = subprocess.run(
        [*starter, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *plugin, *parts], cwd=ROOT,
        env={name: value for name, value in environment.items() if value is not None}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 100


@pytest.mark.parametrize("kernels", KERNELS)
def test_other_kernels(kernels):
    passes(DIGITS, **KERNELS[kernels])


@pytest.mark.parametrize("what", INHERITED)
def test_what_a_process_inherits(what):
    starter, variables = INHERITED[what]
    if what == "read-only tree" and (not shutil.which("unshare") or subprocess.run(
            [*starter, "true"], capture_output=True).returncode):
        pytest.skip("needs the right to mount, or user namespaces")
    passes(PROCESSES, starter, **variables)
