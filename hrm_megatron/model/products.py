"""Layers that keep less for backward: a gate by itself, and with --recompute-products no results of gates.

SwiGLU and attention's output gate are products of factors that are kept anyway. A product is read by one linear layer,
which keeps it for the gradient of its weight. Here its memory goes once that layer has run, and comes back, filled from
the factors, when the gradient arrives there. No graph is built again and no layer knows of it: the tensor stays, its
storage is emptied and filled. (Megatron's CheckpointWithoutOutput builds the graph again, keeps states of random
generators and compiles C++ at run time.)
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP

from hrm_megatron.model.functions import fused_on_a_gpu, gated, gated_gradients, swiglu, swiglu_gradient
from hrm_megatron.model.hrm_config import HRMConfig


class Kind:
    """A product of factors and the gradients of these, each one kernel on a GPU."""

    def __init__(self, formula: Callable[..., torch.Tensor], gradients: Callable[..., Any]) -> None:
        def fill(first: torch.Tensor, *others_and_out: torch.Tensor) -> None:
            others_and_out[-1].copy_(formula(first, *others_and_out[:-1]))

        self.formula, self.gradients, self.fill = map(fused_on_a_gpu, (formula, gradients, fill))


SWIGLU, GATED = Kind(swiglu, swiglu_gradient), Kind(gated, gated_gradients)


class DroppedProduct:
    """The memory of one product: dropped after the layer that reads it, there again for the backward of that."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.factors: tuple[torch.Tensor, ...] = ()

    def of(self, *factors: torch.Tensor) -> torch.Tensor:
        """Compute the product."""
        product: torch.Tensor = ProductFunction.apply(self, *factors)
        # `data` has a version counter of its own: autograd need not know that the memory is filled again.
        self.product, self.factors = product.data, tuple(factor.detach() for factor in factors)
        return product

    def drop_after(self, out: torch.Tensor) -> None:
        """Give the memory back now, until the gradient of `out`, the result of what has read it, is known."""
        self.drop()
        if out.requires_grad:
            out.register_hook(self.fill)

    def drop(self) -> None:
        self.product.untyped_storage().resize_(0)

    def fill(self, _: torch.Tensor) -> None:
        self.product.untyped_storage().resize_(self.product.nbytes)
        self.kind.fill(*self.factors, self.product)


class ProductFunction(torch.autograd.Function):
    """The product as autograd sees it; its backward comes after that of what has read it."""

    @staticmethod
    def forward(ctx: Any, dropped: DroppedProduct, *factors: torch.Tensor) -> torch.Tensor:
        ctx.dropped = dropped
        ctx.save_for_backward(*factors)
        return dropped.kind.formula(*factors)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        ctx.dropped.drop()
        ctx.dropped.factors = ()
        gradients = ctx.dropped.kind.gradients(grads[0], *ctx.saved_tensors)
        return None, *(gradients if isinstance(gradients, tuple) else (gradients,))


class GatedAttention(SelfAttention):  # type: ignore[misc]
    """Megatron's attention with an output gate."""

    def get_query_key_value_tensors(self, *arguments: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        """Queries, keys, values and gate, the last in memory of its own.

        The compiled product keeps its inputs, and a view of the projection would keep all four of them.
        """
        *others, gate = super().get_query_key_value_tensors(*arguments, **options)
        return *others, gate.contiguous()

    def _apply_output_gate(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        if not self.config.recompute_products:
            gated_x: torch.Tensor = super()._apply_output_gate(x, gate)
            return gated_x
        self.dropped = DroppedProduct(GATED)
        return self.dropped.of(x, gate.view(x.shape))

    def forward(self, *arguments: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend as Megatron does."""
        out, bias = super().forward(*arguments, **options)
        if self.config.recompute_products:
            self.dropped.drop_after(out)
            del self.dropped
        return out, bias


class DroppedSwiGLU(torch.nn.Module):
    """The activation of the MLP below, [s, b, 2 * ffn/tp] to [s, b, ffn/tp]."""

    def __init__(self, config: HRMConfig) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.dropped = DroppedProduct(SWIGLU)
        return self.dropped.of(x)


class DroppingMLP(MLP):  # type: ignore[misc]
    """Megatron's MLP around an activation whose result is dropped."""

    def forward(self, *arguments: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [s, b, h] to [s, b, h], and no bias."""
        out, bias = super().forward(*arguments, **options)
        self.activation_func.dropped.drop_after(out)
        del self.activation_func.dropped
        return out, bias
