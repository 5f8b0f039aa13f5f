"""Linear layers on a product of our own, where Megatron's cannot be compiled or runs slower.

A compiler can follow this one down to the gradient in `main_grad`; Apex's kernel stops it (layers/compiled.py). And
where gradients are added there, Megatron's answers autograd with a whole tensor at every tick (parallel/main_grad.py).

On a CPU the product is oneDNN's on processors on which that of MKL, torch's own choice, is slower. MKL leaves the
widest instructions of other makers' processors unused. Measured in fp32 on one core of an AMD EPYC with AVX-512:
2048 x 512 by 512 x 2048 ran at 100 to 106 GFLOP/s instead of 88 to 92, forward and for the gradient of the input; the
gradient of the weight gained nothing, and small products pay 12 us a call.
"""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from hrm_megatron.parallel.main_grad import add_weight_gradient, already_added, answer_once

CPU_FACTS = Path("/proc/cpuinfo")
MIN_MULTIPLICATIONS = 1 << 24  # of a product, below which MKL is not slower


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a b^T, [m, k] and [n, k] to [m, n]."""
    if a.is_cuda or a.dtype != torch.float32 or a.numel() * len(b) < MIN_MULTIPLICATIONS:
        return a @ b.t()
    out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return out


class LinearFunction(torch.autograd.Function):
    """x [m, k] and weight [n, k] to x weight^T [m, n]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, main_grad: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.main_grad = main_grad
        return product(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x, weight = ctx.saved_tensors
        dx = product(grads[0], weight.t()) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx, None, None
        if ctx.main_grad is None:
            return dx, grads[0].t() @ x, None
        add_weight_gradient(ctx.main_grad, grads[0], x)
        if torch.compiler.is_compiling():  # which takes no notes on weights: a compiled layer does, behind its output
            return dx, None, None
        return dx, already_added(weight), None


def linear(x: torch.Tensor, weight: torch.Tensor, fusion: bool = False) -> torch.Tensor:
    """x [..., k] and weight [n, k] to x weight^T [..., n]; under `fusion` the gradient of the weight is added to
    its `main_grad`."""
    main_grad = weight.main_grad if fusion else None  # type: ignore[attr-defined]  # Megatron's DDP put it there
    out: torch.Tensor = LinearFunction.apply(x.flatten(0, -2), weight, main_grad)
    return out.unflatten(0, x.shape[:-1])


def on_own_product(stock: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Make the `_forward_impl` of a linear layer: ours for what needs no other rank and no bias, else the stock one."""
    def forward_impl(*, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, allreduce_dgrad: bool,
                     sequence_parallel: bool, gradient_accumulation_fusion: bool,
                     **options: Any) -> torch.Tensor:
        if allreduce_dgrad or sequence_parallel or bias is not None:
            out = stock(input=input, weight=weight, bias=bias, allreduce_dgrad=allreduce_dgrad,
                        sequence_parallel=sequence_parallel,
                        gradient_accumulation_fusion=gradient_accumulation_fusion, **options)
            if gradient_accumulation_fusion:
                answer_once(out, weight)
            return out
        return linear(input, weight, gradient_accumulation_fusion)
    return forward_impl


class OwnColumnParallelLinear(ColumnParallelLinear):  # type: ignore[misc]
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._forward_impl: Callable[..., torch.Tensor] = on_own_product(self._forward_impl)


class OwnRowParallelLinear(RowParallelLinear):  # type: ignore[misc]
    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._forward_impl: Callable[..., torch.Tensor] = on_own_product(self._forward_impl)


class OwnProductProvider(LocalSpecProvider):  # type: ignore[misc]
    """Megatron's local layers, but for the linear ones."""

    def column_parallel_linear(self) -> type:
        return OwnColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return OwnRowParallelLinear


def runs_faster_on_onednn() -> bool:
    """Tell whether this machine is one of those."""
    return (not torch.cuda.is_available() and torch.backends.mkldnn.is_available() and CPU_FACTS.exists()
            and "AuthenticAMD" in CPU_FACTS.read_text())


def local_provider(compiled: bool = False) -> LocalSpecProvider:
    """Return the layers for this machine where Transformer Engine is not asked for; `compiled`: for a compiler."""
    own = compiled or torch.cuda.is_available() or runs_faster_on_onednn()
    return OwnProductProvider() if own else LocalSpecProvider()
