"""Let stock Megatron run without CUDA; all patches for CPUs are in this module.

Call `activate()` before the first `megatron` import. With a GPU it only fixes two bugs of the 0.19.2 wheel and, where
Apex's weight gradient kernel is missing, provides a replacement. Without one it also redirects Megatron's CUDA calls to
CPU tensors, gloo and null streams; `torch.cuda.is_available()` still returns False. File names in the comments refer
to that wheel.
"""
from __future__ import annotations

import collections
import contextlib
import functools
import importlib.abc
import importlib.util
import inspect
import os
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec
from typing import Any

import torch
from torch.utils._device import _device_constructors

from hrm_megatron.parallel.main_grad import APEX, add_weight_gradient, find_apex

CPU = torch.device("cpu")
FACTORIES = (
    "empty", "zeros", "ones", "full", "tensor", "as_tensor", "arange", "linspace", "eye", "rand", "randn", "randint",
    "randperm", "empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like",
)
PRETENDED_MEMORY_BYTES = 1 << 34

Patch = Callable[[Any], None]


def _is_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return type(device) is int or (isinstance(device, str) and device.startswith("cuda"))


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Send `device="cuda"` to the CPU and drop `pin_memory`, which needs a driver."""
    @functools.wraps(factory)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)
    return wrapper


class NullStream:
    """A stream or event on which all work is already complete."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def _nothing(self, *_: Any, **__: Any) -> None: ...

    wait_event = wait_stream = wait = record = synchronize = _nothing

    def record_event(self, event: Any = None) -> Any:
        # Megatron-FSDP waits on what this returns (distributed/fsdp/src/.../param_and_grad_buffer.py).
        return event or NullStream()

    def query(self) -> bool:
        return True

    def elapsed_time(self, *_: Any) -> float:
        return 0.0

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0

    def __enter__(self) -> NullStream:
        return self

    def __exit__(self, *_: object) -> None: ...


class NullEvent(NullStream):
    """A separate type, because code distinguishes events from streams by type."""


def _patch_tensors() -> None:
    # `with torch.device(...)` recognizes factories by identity and caches them at first use: cache the stock ones.
    _device_constructors()
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for cls in (torch.Tensor, torch.nn.Module):
        def to(self: Any, *args: Any, _stock: Callable[..., Any] = cls.to, **kwargs: Any) -> Any:
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = CPU
            return _stock(self, *(CPU if _is_cuda(a) else a for a in args), **kwargs)
        cls.to = to  # type: ignore[method-assign]
        cls.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    torch.Tensor.new_empty = _on_cpu(torch.Tensor.new_empty)  # type: ignore[method-assign]
    torch.Tensor.pin_memory = lambda self, *_, **__: self  # type: ignore[method-assign]
    stock_type = torch.Tensor.type

    def type_name(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        # The optimizers dispatch on the string "torch.cuda.FloatTensor" (optimizer/distrib_optimizer.py:401).
        if dtype is not None:
            return stock_type(self, dtype, *args, **kwargs)
        return stock_type(self).replace("torch.", "torch.cuda.", 1)
    torch.Tensor.type = type_name  # type: ignore[method-assign,assignment]


def _patch_cuda_module() -> None:
    properties = types.SimpleNamespace(
        name="cpu", major=9, minor=0, total_memory=PRETENDED_MEMORY_BYTES, multi_processor_count=1)
    stream = NullStream()
    answers: dict[str, Any] = {
        # current_device must be an int (FSDP formats "cuda:{...}"); with device_count 0 Megatron would silently skip
        # initialize_model_parallel (training/initialize.py:270).
        "current_device": 0, "device_count": 1, "set_device": None, "synchronize": None, "empty_cache": None,
        "get_device_name": "cpu", "get_device_properties": properties, "get_device_capability": (9, 0),
        "memory_allocated": 0, "max_memory_allocated": 0, "memory_reserved": 0, "max_memory_reserved": 0,
        "reset_peak_memory_stats": None, "mem_get_info": (PRETENDED_MEMORY_BYTES, PRETENDED_MEMORY_BYTES),
        "is_current_stream_capturing": False, "set_stream": None, "current_stream": stream, "default_stream": stream,
        "manual_seed_all": None,
    }
    cuda: Any = torch.cuda
    for name, answer in answers.items():
        # One function object per name: dynamo's rule table rejects a function registered under two names.
        setattr(cuda, name, lambda *_, _answer=answer, **__: _answer)
    cuda.memory_stats = lambda *_: collections.defaultdict(int)
    cuda.Stream, cuda.ExternalStream, cuda.Event = NullStream, NullStream, NullEvent
    cuda.stream = lambda *_: contextlib.nullcontext()
    cuda.device = lambda *_: contextlib.nullcontext()
    # The "CUDA" generator is the CPU generator. torch.manual_seed calls cuda.manual_seed, so do not call it here.
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(seed)
    cuda.initial_seed = lambda: torch.initial_seed()
    for name in ("range_push", "range_pop", "mark"):
        setattr(cuda.nvtx, name, lambda *_, _name=name, **__: None)
    cuda.nvtx.range = lambda *_, **__: contextlib.nullcontext()


def _with_gloo(make_group: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(make_group)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        call = inspect.signature(make_group).bind_partial(*args, **kwargs).arguments
        if call.get("backend") in (None, "nccl"):
            call["backend"] = "gloo"
        for cuda_only in ("device_id", "pg_options"):
            call.pop(cuda_only, None)
        return make_group(**call)
    return wrapper


def _patch_process_groups() -> None:
    distributed: Any = torch.distributed
    for name in ("init_process_group", "new_group"):
        setattr(distributed, name, _with_gloo(getattr(distributed, name)))
    from_group = distributed.DeviceMesh.from_group
    distributed.DeviceMesh.from_group = staticmethod(  # torch FSDP2 requests a "cuda" mesh
        lambda group, device_type, *args, **kwargs: from_group(group, "cpu", *args, **kwargs))


def _patch_rng(module: Any) -> None:
    # Stock _set_cuda_rng_state defers its call until CUDA is initialized, which never happens.
    module._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    module._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)

    @contextlib.contextmanager
    def fork(self: Any, name: str = module._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        # Stock fork also warns that the CPU generator changed; here it is meant to.
        if name not in self.states_:
            raise KeyError(f"rng state {name} is not added")
        before = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(before)
    module.CudaRNGStatesTracker.fork = fork


def _patch_training(module: Any) -> None:
    module.initialize_megatron = functools.partial(module.initialize_megatron, allow_no_cuda=True)
    module.set_jit_fusion_options = lambda *_, **__: None  # it warms up CUDA kernels
    stock = module.build_train_valid_test_data_iterators

    def build(*args: Any, **kwargs: Any) -> Any:
        # DataLoader iterators draw a seed from the CPU generator, which is the dropout generator here.
        state = torch.get_rng_state()
        try:
            return stock(*args, **kwargs)
        finally:
            torch.set_rng_state(state)
    module.build_train_valid_test_data_iterators = build


def _provide_weight_gradients() -> None:
    # Replace Apex's kernels unless this process can use them. Without any, autograd would accumulate the gradients of
    # all ticks in the weight's dtype, bf16, and round at each addition.
    if find_apex().kernels:
        return
    kernels: Any = importlib.util.module_from_spec(ModuleSpec(APEX, None))
    kernels.wgrad_gemm_accum_fp32 = kernels.wgrad_gemm_accum_fp16 = (
        lambda x, grad, main_grad: add_weight_gradient(main_grad, grad, x))
    sys.modules[kernels.__name__] = kernels


def _patch_async_save(module: Any) -> None:
    # A spawned queue manager would import the main program again; a forked one does not.
    module.get_write_results_queue = functools.partial(module.get_write_results_queue, mp_mode="fork")


def _patch_async_callers(module: Any) -> None:
    # The worker of --use-persistent-ckpt-worker selects a GPU. Use a process forked for each save instead.
    module.AsyncCallsQueue.warmup_persistent_caller = lambda *_, **__: None
    module.AsyncCallsQueue._get_async_caller = lambda self: module.TemporalAsyncCaller()


def _patch_fsdp_gathers(module: Any) -> None:
    # Megatron-FSDP orders all-gather, use and release of a buffer by streams. gloo's own threads ignore these and would
    # write into released buffers: a segmentation fault within some 100 steps.
    stock = module._coalescing_manager

    @contextlib.contextmanager
    def wait_at_once(group: Any, async_ops: bool = False) -> Iterator[NullStream]:
        with stock(group, async_ops=False):
            yield NullStream()
    module._coalescing_manager = wait_at_once


def _repair_no_grad(module: Any) -> None:
    # The only one of these loaders without @torch.no_grad() (optimizer/distrib_optimizer.py:2061).
    cls = module.DistributedOptimizer
    cls.load_parameter_state_from_dp_reshardable = torch.no_grad()(cls.load_parameter_state_from_dp_reshardable)


def _repair_helpers(module: Any) -> None:
    # Stock runs `make` in a folder without a Makefile and exits; the wheel ships the compiled extension.
    module.compile_helpers = lambda: None


# Module to patches, applied right after the module is executed.
EVERYWHERE: dict[str, Sequence[Patch]] = {
    "megatron.core.datasets.utils": [_repair_helpers],
    "megatron.core.optimizer.distrib_optimizer": [_repair_no_grad],
}
WITHOUT_CUDA: dict[str, Sequence[Patch]] = {
    "megatron.core.tensor_parallel.random": [_patch_rng],
    "megatron.training.training": [_patch_training],
    "megatron.core.dist_checkpointing.strategies.filesystem_async": [_patch_async_save],
    "megatron.core.dist_checkpointing.strategies.async_utils": [_patch_async_callers],
    "megatron.core.distributed.fsdp.src.megatron_fsdp.param_and_grad_buffer": [_patch_fsdp_gathers],
}


class _PatchingFinder(importlib.abc.MetaPathFinder):
    """Import hook that applies patches right after a listed module is executed; ignores all other modules."""

    def __init__(self, patches: dict[str, Sequence[Patch]]) -> None:
        self.patches = dict(patches)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        patches = self.patches.pop(fullname, None)
        spec = importlib.util.find_spec(fullname) if patches else None
        if not patches or spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: types.ModuleType) -> None:
            execute(module)
            for patch in patches:
                patch(module)
        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_active = False


def activate() -> None:
    """Prepare this process for Megatron. Idempotent; raises RuntimeError if Megatron is already imported."""
    global _active
    if _active:
        return
    if any(name.startswith(("megatron.core", "megatron.training")) for name in sys.modules):
        raise RuntimeError("hrm_megatron.parallel.cpu.activate() must run before megatron is imported")
    _active = True
    _provide_weight_gradients()
    if torch.cuda.is_available():
        sys.meta_path.insert(0, _PatchingFinder(EVERYWHERE))
        return
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # Megatron's jit_fuser is torch.compile (core/jit.py:21)
    sys.meta_path.insert(0, _PatchingFinder({**EVERYWHERE, **WITHOUT_CUDA}))
    _patch_tensors()
    _patch_cuda_module()
    _patch_process_groups()
