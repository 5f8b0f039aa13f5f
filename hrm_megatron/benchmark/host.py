"""Measure the host cost of a micro-batch: launches, calls and time per tick and per micro-batch, with or without a GPU.

A GPU idles if the host takes longer to launch a tick than the tick takes to run. Host time depends on layers, calls and
examples, and hardly on sizes. So without a GPU the model is narrow, its rows are short (with as many examples as rows
of the given length), and the attention kernel does nothing: what remains is host time. The optimizer step, one per step
of many micro-batches, is not included.
"""
from __future__ import annotations

import cProfile
import pstats
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.utils._python_dispatch import TorchDispatchMode

from hrm_megatron.attention.core import KERNELS, VarlenAttention
from hrm_megatron.attention.varlen import VarlenCall
from hrm_megatron.benchmark.rows import MEAN_TOKENS, PREFIX_TOKENS
from hrm_megatron.config import Architecture
from hrm_megatron.data.batch import PackedBatch, assemble_row
from hrm_megatron.layers import functions
from hrm_megatron.model.hrm import HRMModel
from hrm_megatron.transformer_config import hrm_config

STAND_IN = "sdpa"  # replaced by a kernel that does nothing, since it can run on any machine
NARROW = Architecture(1, hidden_size=32, num_attention_heads=2, ffn_hidden_size=64, vocab_size=256)
SHORTER = 32  # factor by which rows are shortened without a GPU
# Functions of layers/functions.py that are one compiled kernel on a GPU, and CPU loops that stand in for such a kernel
# (ours or Megatron's).
ONE_KERNEL = ("normalize", "normalize_backward", "rotate", "norm_in_loops", "norm_gradient_in_loops", "gated_in_loops",
              "gated_gradients_in_loops", "swiglu_in_loops", "swiglu_gradient_in_loops")
# Operations, besides views, that launch no kernel.
FREE = ("detach", "empty", "empty_like", "empty_strided", "new_empty", "_local_scalar_dense", "_efficientzerotensor")
FEWER_TICKS, MORE_TICKS = 2, 5
ROUNDS = 7


@dataclass(frozen=True)
class Cost:
    """`calls` counts Python and torch function calls. `launches` is None for compiled code on a CPU; `device_seconds`,
    the time of kernels, is None without a GPU."""

    launches: int | None
    calls: int
    seconds: float
    device_seconds: float | None = None

    def less(self, other: Cost, times: int) -> Cost:
        """Return (this cost - `other`) / `times`."""
        def share(ours: float | None, theirs: float | None) -> Any:
            return None if ours is None or theirs is None else (ours - theirs) / times
        return Cost(share(self.launches, other.launches), share(self.calls, other.calls),
                    share(self.seconds, other.seconds), share(self.device_seconds, other.device_seconds))


NOTHING = Cost(0, 0, 0.0, 0.0)


class Launches(TorchDispatchMode):
    """Counts the operations that would launch a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.inside = 0, False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.inside and not func.is_view and func.__name__.split(".")[0] not in FREE:
            self.count += 1
        return func(*args, **(kwargs or {}))

    @contextmanager
    def of_a_gpu(self) -> Iterator[None]:
        """Count each of ONE_KERNEL as one launch."""
        stock = {name: getattr(functions, name) for name in ONE_KERNEL}

        def once(function: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any) -> Any:
                self.count, self.inside = self.count + 1, True
                try:
                    return function(*arguments)
                finally:
                    self.inside = False
            return run
        for name, function in stock.items():
            setattr(functions, name, once(function))
        try:
            yield
        finally:
            for name, function in stock.items():
                setattr(functions, name, function)


class _NoKernel(torch.autograd.Function):
    """An attention kernel that computes nothing: one launch in forward, one in backward."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(q, k, v)
        return torch.zeros_like(q)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.zeros_like(ctx.saved_tensors[0]), *map(torch.empty_like, ctx.saved_tensors[1:])


def _no_kernel(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, call: VarlenCall,
               scale: float | None) -> torch.Tensor:
    out: torch.Tensor = _NoKernel.apply(q, k, v)
    return out


class _OnlyTheHost(VarlenAttention):
    """The host work of a kernel with two calls over all rows."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.primitive = _no_kernel


@contextmanager
def attention_without_kernel() -> Iterator[None]:
    """Replace STAND_IN by attention that computes nothing, within the block."""
    stock, KERNELS[STAND_IN] = KERNELS[STAND_IN], _OnlyTheHost
    try:
        yield
    finally:
        KERNELS[STAND_IN] = stock


def build(architecture: Architecture, compile_layers: bool) -> HRMModel:
    """Return the model of `architecture` in bf16, or on a CPU a narrow one with as many layers."""
    cuda = torch.cuda.is_available()
    if not cuda:
        architecture = replace(NARROW, num_layers=architecture.num_layers)
    with nullcontext() if cuda else attention_without_kernel():
        model = HRMModel(hrm_config(
            architecture, bf16=True, params_dtype=torch.bfloat16, gradient_accumulation_fusion=True,
            compile_layers=compile_layers, attention_kernel="auto" if cuda else STAND_IN), 1).train()
    for weight in model.parameters():  # as Megatron's DDP sets them
        weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
        weight.grad_added_to_main_grad = False
    return model


def example_rows(row_tokens: int, rows: int) -> PackedBatch:
    """Return rows of equal examples with the mean length of rows.py, shortened by SHORTER on a CPU."""
    shorter = 1 if torch.cuda.is_available() else SHORTER
    example, prefix = MEAN_TOKENS // shorter, sum(PREFIX_TOKENS) // 2 // shorter
    one = np.ones(prefix, np.int64), np.ones(example - prefix + 1, np.int64)
    row = assemble_row([one] * max(1, row_tokens // MEAN_TOKENS), row_tokens // shorter)
    batch = PackedBatch.from_rows({name: tensor.expand(rows, -1) for name, tensor in row.items()})
    return batch.to("cuda") if torch.cuda.is_available() else batch


def measure(run: Callable[[], object], compiled: bool) -> Cost:
    """Count and time the host work of `run`, which must be warmed up."""
    seconds = []
    for _ in range(ROUNDS):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.thread_time()  # least affected by other processes
        run()
        seconds.append(time.thread_time() - start)
    with cProfile.Profile() as profile:
        run()
    calls = pstats.Stats(profile).total_calls  # type: ignore[attr-defined]
    if torch.cuda.is_available():
        return Cost(*_on_the_device(run, calls, min(seconds)))
    launches = Launches()
    if not compiled:
        with launches.of_a_gpu(), launches:
            run()
    return Cost(None if compiled else launches.count, calls, min(seconds))


def _on_the_device(run: Callable[[], object], calls: int, seconds: float) -> tuple[int, int, float, float]:
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    kernels = [event for event in found.events() if event.device_type == DeviceType.CUDA]
    return len(kernels), calls, seconds, sum(event.self_device_time_total for event in kernels) / 1e6


def measure_host(architecture: Architecture, row_tokens: int, rows: int, compile_layers: bool) -> dict[str, Cost]:
    """Return the costs of a tick without gradient, of the gradient of a tick, and of whole micro-batches of `rows`
    rows."""
    model, batch = build(architecture, compile_layers), example_rows(row_tokens, rows)
    sequences = model.sequences(batch)

    def forward() -> None:
        with torch.no_grad():
            model.states(batch, sequences=sequences)

    def step(bp_steps: int) -> Callable[[], None]:
        def run() -> None:
            model(batch=batch, bp_steps=bp_steps, sequences=sequences)[0].sum().backward()
            for weight in model.parameters():
                weight.grad = None
        return run
    parts = dict(forward=forward, fewer=step(FEWER_TICKS), more=step(MORE_TICKS))
    # Run backward in this thread, since its time is measured.
    with torch.autograd.set_multithreading_enabled(False):
        for run in parts.values():
            run(), run()  # warm-up: compiles
        found = {name: measure(run, compile_layers) for name, run in parts.items()}
    untrained = found["forward"].less(NOTHING, len(model.ticks(None)))
    more = found["more"].less(found["fewer"], MORE_TICKS - FEWER_TICKS)  # with the extra cost of the graph in forward
    return {"tick without gradient": untrained, "gradient of a tick": more,
            f"micro-batch, bp {FEWER_TICKS}": found["fewer"], f"micro-batch, bp {MORE_TICKS}": found["more"]}


def table(found: dict[str, Cost]) -> list[str]:
    """Return the costs as lines of a table."""
    lines = [f"{'':24}{'launches':>10}{'calls':>10}{'host ms':>10}{'GPU ms':>10}"]
    for name, cost in found.items():
        launches = "" if cost.launches is None else f"{cost.launches:,.0f}"
        device = "" if cost.device_seconds is None else f"{1e3 * cost.device_seconds:.2f}"
        lines.append(f"{name:24}{launches:>10}{cost.calls:>10,.0f}{1e3 * cost.seconds:>10.2f}{device:>10}")
    return lines
