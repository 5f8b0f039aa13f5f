"""A CUDA device that computes nothing: fake tensors whose device is "cuda", for the code that only a GPU reaches.

After `pretend_cuda()`, before the first import of Megatron, `torch.cuda` answers our code and Megatron as with a GPU,
and torch itself that there is none. Shapes, dtypes, autograd and dynamo are torch's own. Values do not exist, so that
whatever makes the host wait for one is an error: reading it, a shape that depends on it, a copy from pageable memory.
"""
from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from hrm_megatron.parallel import cpu

OURS = ("hrm_megatron", "megatron", "tests")
DEVICE = torch.device("cuda", 0)
ATEN = torch.ops.aten
COPIES = {ATEN._to_copy.default: 0, ATEN.copy_.default: 1}  # and which argument is the source
HAS_CONTEXT = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_int8)
# Of hasPrimaryContext among the virtual functions, behind two destructors (ATen/detail/AcceleratorHooksInterface.h).
SLOT, SLOTS = 4, 128
KEPT: list[Any] = []


class Graphs(list[torch.fx.GraphModule]):
    """What was compiled; it runs as it was traced."""

    def keep(self, graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        self.append(graph)
        return graph


FORWARDS, BACKWARDS = Graphs(), Graphs()
COMPILER: list[Any] = [aot_autograd(fw_compiler=FORWARDS.keep, bw_compiler=BACKWARDS.keep)]  # the last is taken


def _without_driver() -> None:
    """Answer autograd, which asks before each backward, that no device has a context: stock code asks the driver.

    The question is a virtual function of an object that torch exports: it gets a copy of its table with our answer.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    library._ZN2at6detail12getCUDAHooksEv.restype = ctypes.c_void_p
    hooks = ctypes.cast(library._ZN2at6detail12getCUDAHooksEv(), ctypes.POINTER(ctypes.c_void_p))
    functions = ctypes.c_void_p * SLOTS
    table = functions(*functions.from_address(hooks[0]))  # type: ignore[arg-type]
    answer = HAS_CONTEXT(lambda hooks, index: False)
    table[SLOT] = ctypes.cast(answer, ctypes.c_void_p).value
    hooks[0] = ctypes.addressof(table)
    KEPT.extend((table, answer))


def _there(factory: Callable[..., Any]) -> Callable[..., Any]:
    """Understand the number of a device, which torch takes for one that it has, and send what has values."""
    @functools.wraps(factory)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if type(kwargs.get("device")) is int:
            kwargs["device"] = DEVICE
        if factory.__name__ in ("tensor", "as_tensor") and (device := kwargs.pop("device", None)) is not None:
            return factory(*args, **kwargs).to(device)
        return factory(*args, **kwargs)
    return wrapper


def _pin_memory(self: torch.Tensor, *_: Any) -> torch.Tensor:
    pinned = self.clone()
    pinned.in_pinned_memory = True  # type: ignore[attr-defined]
    return pinned


@functools.cache
def pretend_cuda() -> None:
    """Be a machine with one Hopper GPU, as far as our code and Megatron can tell."""
    _without_driver()
    cpu._patch_cuda_module()
    replaced: Any = torch
    replaced.cuda._lazy_init = lambda: None
    replaced.cuda.is_available = lambda: sys._getframe(1).f_globals.get("__name__", "").split(".")[0] in OURS
    replaced.compile = functools.partial(torch.compile, backend=COMPILER[-1])
    replaced.Tensor.pin_memory = _pin_memory
    for name in cpu.FACTORIES:
        setattr(torch, name, _there(getattr(torch, name)))
    stock_group = torch.distributed.new_group
    replaced.distributed.new_group = lambda *args, **kwargs: stock_group(
        *args, **{**kwargs, "backend": "fake", "pg_options": None})
    cpu.activate()


class Device(TorchDispatchMode):
    """What is on the host is real and computed; what is made on the device, or sent there, is fake.

    Under `strict` a copy for which the host would have to wait is an error. `reads` counts values that the host asked
    for, and would have to wait for too; it gets ones. `collectives` names those that were started, in turn; `results`
    counts the operations whose result has a shape and dtype of `watched`, views left out.
    """

    supports_higher_order_operators = True  # they pass through, too

    def __init__(self) -> None:
        super().__init__()
        self.fake, self.strict = FakeTensorMode(allow_non_fake_inputs=True), False
        self.reads = 0
        self.collectives: list[str] = []
        self.watched: set[tuple[torch.Size, torch.dtype]] = set()
        self.results: Counter[str] = Counter()

    @classmethod
    def is_infra_mode(cls) -> bool:  # else dynamo would leave alone what runs under it
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is ATEN.addmm.dtype_out:  # its fake is a formula that takes the dtype for a factor
            return kwargs["out"]
        if func is ATEN._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            self.reads += 1
            return torch.ones((), dtype=args[0].dtype).item()
        if getattr(func, "namespace", "") == "c10d" and any(isinstance(t, FakeTensor) for t in tree_leaves(args)):
            self.collectives.append(func.__name__.split(".")[0])
            # With something on the host in place of each tensor, for the sake of the handle.
            done = func(*tree_map_only(FakeTensor, lambda _: torch.empty(1), args), **kwargs)
            return (args[0], *done[1:]) if isinstance(done, (tuple, list)) else done
        there = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda"
        with self.fake if there else contextlib.nullcontext():
            out = func(*args, **kwargs)
        if self.strict and func in COPIES:
            source = args[COPIES[func]]
            if source.device.type != out.device.type and source.numel() and not (
                    getattr(source, "in_pinned_memory", False) and kwargs.get("non_blocking")):
                raise AssertionError(f"the host waits for a copy of {tuple(source.shape)} from {source.device} to "
                                     f"{out.device}")
        if isinstance(out, torch.Tensor) and (out.shape, out.dtype) in self.watched and not func.is_view:
            self.results[func.__name__] += 1
        return out


@contextlib.contextmanager
def ranks(count: int, **layout: int) -> Iterator[Device]:
    """Be rank 0 of `count` ranks whose collectives carry nothing; `layout` is for `initialize_model_parallel`."""
    from megatron.core import parallel_state, tensor_parallel

    torch.distributed.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    parallel_state.initialize_model_parallel(**layout)
    try:
        with Device() as device:
            tensor_parallel.model_parallel_cuda_manual_seed(1234)
            yield device
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
