"""Compiled loops: what is kept of them from one process to the next."""
from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_a_loop_is_compiled_again_when_what_it_calls_has_changed(tmp_path):
    """Machine code that is kept beside a file must not outlive an update of another one.

    Without files of bytecode (`-B`): Python takes them as current while the second of a source's last change and
    its size are the same, which two of the updates here can be.
    """
    package = tmp_path / "hrm_megatron"
    package.mkdir()
    (package / "data").mkdir()
    shutil.copy(ROOT / "hrm_megatron" / "data" / "kernels.py", package / "data")
    (package / "loops.py").write_text("from hrm_megatron.data.kernels import compiled\n"
                                      "from hrm_megatron.called import number\n"
                                      "@compiled\ndef loop():\n    return number()\n")
    said = []
    for number in (1, 1, 2):
        (package / "called.py").write_text(f"from numba.extending import register_jitable\n"
                                           f"@register_jitable\ndef number():\n    return {number}\n")
        said.append(subprocess.run(
            [sys.executable, "-B", "-c", "from hrm_megatron.loops import loop\n"
                                         "print(loop(), sum(loop.stats.cache_hits.values()))"],
            cwd=tmp_path, env={"PATH": "", "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True,
            check=True).stdout)
    assert said == ["1 0\n", "1 1\n", "2 0\n"]
