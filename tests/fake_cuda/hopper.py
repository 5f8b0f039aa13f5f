"""Kernels that torch's compiler makes for a Hopper GPU, built where there is none: its own code generator, Triton and
the assembler ptxas, which comes with Triton, need to know a device and not to have one.

    python -m tests.fake_cuda.hopper        registers, spilled bytes and shared memory of each kernel of a step of XL
"""
from __future__ import annotations

import copy
import os
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch._dynamo.device_interface import CudaInterface
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor import compile_fx
from torch._inductor import config as inductor
from torch._inductor.runtime import triton_helpers, triton_heuristics
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from tests.fake_cuda import device

# An H100 SXM5 (NVIDIA's data sheet and programming guide, compute capability 9.0).
H100 = types.SimpleNamespace(
    name="NVIDIA H100", major=9, minor=0, total_memory=80 << 30, multi_processor_count=132, warp_size=32,
    regs_per_multiprocessor=65_536, max_threads_per_multi_processor=2048, max_threads_per_block=1024,
    shared_memory_per_block_optin=232_448, L2_cache_size=50 << 20)
BUILT: list[Any] = []  # compiled configurations, as Triton returns them


class _Driver:
    """What Triton asks of a driver to compile."""

    utils = types.SimpleNamespace(get_device_properties=lambda _: dict(
        max_shared_mem=H100.shared_memory_per_block_optin, multiprocessor_count=H100.multi_processor_count,
        warpSize=H100.warp_size, max_num_regs=H100.regs_per_multiprocessor))

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return device.DEVICE


@dataclass(frozen=True)
class Kernel:
    """A kernel in one of the configurations among which a run would choose by trying them."""

    name: str
    registers: int
    spilled_bytes: int
    shared_bytes: int


def pretend_hopper() -> None:
    """Let torch.compile build for an H100, and run what it was given as it was traced."""
    interface, heuristics, helpers, settings = (CudaInterface, triton_heuristics.CachingAutotuner, triton_helpers,
                                                inductor)
    replaced: Any = interface
    replaced.get_device_properties = staticmethod(lambda *_: H100)
    replaced.Worker.get_device_properties = staticmethod(lambda *_: H100)
    replaced.get_compute_capability = staticmethod(lambda *_: 90)
    replaced.is_bf16_supported = staticmethod(lambda *_, **__: True)
    replaced.is_available = staticmethod(lambda: True)
    driver.set_active(_Driver())
    helpers.set_driver_to_gpu = lambda: None
    heuristics._make_launchers = lambda self: BUILT.extend(result.kernel for result in self.compile_results)
    heuristics._dynamic_scale_rblock = lambda self: None  # smaller blocks of reductions, by registers and on a device
    settings.compile_threads, settings.fx_graph_cache, settings.use_static_cuda_launcher = 1, False, False
    settings.joint_graph_constant_folding = False  # it would run constants on the device
    device.COMPILER.append(lambda graph, inputs: compile_fx.compile_fx(graph, inputs, inner_compile=_build))


def _build(graph: torch.fx.GraphModule, inputs: Any, **options: Any) -> Any:
    compile_fx.compile_fx_inner(copy.deepcopy(graph), inputs, **options)
    return make_boxed_func(graph.forward)


def kernels() -> Iterator[Kernel]:
    """Assemble what was built once more: ptxas says what it needs."""
    for built in BUILT:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "kernel.ptx"
            source.write_text(built.asm["ptx"])
            assembler = triton.knobs.nvidia.ptxas.path
            said = subprocess.run([assembler, "-v", "--gpu-name=sm_90a", source, "-o", source.with_suffix(".cubin")],
                                  capture_output=True, text=True, check=True).stderr
        registers, = re.findall(r"Used (\d+) registers", said)
        spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", said)
        yield Kernel(built.metadata.name, int(registers), sum(map(int, spills)), built.metadata.shared)


def main() -> None:
    os.environ.pop("TORCHDYNAMO_DISABLE", None)
    pretend_hopper()
    device.pretend_cuda()
    from hrm_megatron.config import PRESETS, Architecture
    from hrm_megatron.data.batch import assemble_row
    from tests.fake_cuda import probe

    probe.check_gradients_once(probe.CHECK)
    preset, row_tokens = PRESETS["XL"], 4096
    probe.ARCHITECTURE = Architecture(1, preset.hidden_size, preset.num_attention_heads, preset.ffn_hidden_size, 65_536)
    probe.ROW_TOKENS, probe.BP_STEPS = row_tokens, (5,)
    probe.ROWS = [assemble_row([(range(1, 300), range(1, 500))] * 5, row_tokens)]
    for layers in ("compiled", "plain"):
        BUILT.clear()
        probe.train(compile_layers=layers == "compiled")
        by_name: dict[str, list[Kernel]] = {}
        for kernel in kernels():
            by_name.setdefault(kernel.name, []).append(kernel)
        print(f"{layers} layers", f"{'registers':>40}{'spilled bytes':>15}{'shared bytes':>14}  of each configuration")
        for name, found in by_name.items():
            print(f"{name[:60]:60}", *("/".join(str(value) for value in values) for values in (
                [one.registers for one in found], [one.spilled_bytes for one in found],
                [one.shared_bytes for one in found])), sep="  ")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # what is torn down behind this asks a device that is not there, and may crash
