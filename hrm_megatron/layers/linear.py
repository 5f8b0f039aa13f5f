"""Megatron's linear layers on a matmul of our own, which is traceable and computes no unneeded gradients.

Megatron's layer computes the gradient of its input even if nothing needs it (at the first tick with gradient that is
one [s, h] x [h, 4 h] matmul per micro-batch, and its reduction over the ranks). torch.compile can trace this one down
to the gradient in `main_grad`; Apex's kernel is a graph break (layers/compiled.py). With gradients added to
`main_grad`, Megatron's layer also returns a full-size dummy gradient to autograd at every tick (parallel/main_grad.py).
"""
from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

from hrm_megatron.layers.functions import run
from hrm_megatron.parallel.main_grad import add_weight_gradient, already_added, answer_once
from hrm_megatron.parallel.processor import matmul, weight_gradient

if TYPE_CHECKING:
    from hrm_megatron.layers.lora import Adapter


def whole(x: torch.Tensor, group: Any) -> torch.Tensor:
    """Return x [m/tp, k] all-gathered over `group`, [m, k]; x itself without a group."""
    if group is None:
        return x
    rows = x.new_empty(group.size() * len(x), x.shape[1])
    torch.distributed.all_gather_into_tensor(rows, x.contiguous(), group=group)
    return rows


class LinearFunction(torch.autograd.Function):
    """x [m, k] and weight [n, k] to x weight^T [m, n].

    With a `group`, x is this rank's shard [m/tp, k] of the rows and needs no gradient; backward gathers it again.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, main_grad: torch.Tensor | None,
                group: Any) -> torch.Tensor:
        assert group is None or not ctx.needs_input_grad[0]
        ctx.save_for_backward(x, weight)
        ctx.main_grad, ctx.group = main_grad, group
        return matmul(whole(x, group), weight)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        dx = matmul(grads[0], weight.t()) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx, None, None, None
        x = whole(x, ctx.group)
        if ctx.main_grad is None:
            return dx, weight_gradient(grads[0], x), None, None
        add_weight_gradient(ctx.main_grad, grads[0], x)
        if torch.compiler.is_compiling():  # weights cannot be marked in a trace; CompiledLayer does
            return dx, None, None, None
        return dx, already_added(weight), None, None


def linear(x: torch.Tensor, weight: torch.Tensor, fusion: bool = False, group: Any = None) -> torch.Tensor:
    """x [s, ..., k] and weight [n, k] to x weight^T [s, ..., n]; with `fusion` the weight gradient is added to its
    `main_grad`. With a `group`, x is [s/tp, ..., k] and gets no gradient."""
    # Set by Megatron's DDP on trained weights.
    main_grad = weight.main_grad if fusion and weight.requires_grad else None  # type: ignore[attr-defined]
    out: torch.Tensor = run(LinearFunction, x.flatten(0, -2), weight, main_grad, group)
    return out.view(-1, *x.shape[1:-1], len(weight))


def on_own_matmul(stock: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return the `_forward_impl` of a linear layer: ours if there is no bias and the input's gradient needs no
    communication, else the stock one."""
    def forward_impl(*, input: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, allreduce_dgrad: bool,
                     sequence_parallel: bool, gradient_accumulation_fusion: bool, tp_group: Any,
                     **options: Any) -> torch.Tensor:
        # Stock without gradients too: recompute must reproduce the first forward bitwise.
        wanted = input.requires_grad or not torch.is_grad_enabled()
        if bias is not None or (wanted and (allreduce_dgrad or sequence_parallel)):
            out = stock(input=input, weight=weight, bias=bias, allreduce_dgrad=allreduce_dgrad,
                        sequence_parallel=sequence_parallel, tp_group=tp_group,
                        gradient_accumulation_fusion=gradient_accumulation_fusion, **options)
            if gradient_accumulation_fusion:
                answer_once(out, weight)
            return out
        return linear(input, weight, gradient_accumulation_fusion, tp_group if sequence_parallel else None)
    return forward_impl


class OwnLinear:
    """Mixin of our linear layers: with a tensor parallel group of one rank and no bias a layer is one matmul; any layer
    may have a LoRA adapter."""

    weight: torch.Tensor
    bias: torch.Tensor | None
    tp_group: Any
    gradient_accumulation_fusion: bool
    sequence_parallel: bool

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._forward_impl: Callable[..., torch.Tensor] = on_own_matmul(self._forward_impl)
        self.alone = self.tp_group.size() == 1 and self.bias is None
        self.lora: Adapter | None = None

    def forward(self, input_: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [s/tp under SP, b, k] to [s, b, n/tp], or [s, b, k/tp] to [s/tp under SP, b, n]; no bias."""
        bias = None
        if self.alone:  # skips the stock checks for what to gather and reduce
            out = linear(input_, self.weight, self.gradient_accumulation_fusion)
        else:
            out, bias = super().forward(input_)  # type: ignore[misc]
        return out if self.lora is None else out + self.lora(input_), bias

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Store the layer as Megatron does, and its adapter, whose sharding Megatron does not know."""
        stored: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # type: ignore[misc]
        if self.lora is not None:
            stored |= self.lora.sharded_state_dict(f"{prefix}lora.", sharded_offsets, metadata)
        return stored


class OwnColumnParallelLinear(OwnLinear, ColumnParallelLinear):  # type: ignore[misc]
    """Megatron's ColumnParallelLinear."""


class OwnRowParallelLinear(OwnLinear, RowParallelLinear):  # type: ignore[misc]
    """Megatron's RowParallelLinear."""


class OwnLinearProvider(LocalSpecProvider):  # type: ignore[misc]
    """Megatron's local layers, with our linear ones."""

    def column_parallel_linear(self) -> type:
        return OwnColumnParallelLinear

    def row_parallel_linear(self) -> type:
        return OwnRowParallelLinear
