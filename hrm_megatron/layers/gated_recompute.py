"""Layers that keep less for backward: a gate without the fused QKV buffer and, with --recompute-modules gated_act,
gated activations that are recomputed.

SwiGLU and attention's output gate are products of factors that are kept anyway. The linear layer that reads such a
product keeps it for its weight's gradient. Here its storage is freed once that layer has run, and recomputed from the
factors, in place, when the gradient arrives there. No graph is rebuilt and no layer knows of it: the tensor stays, its
storage is emptied and refilled. (Megatron's CheckpointWithoutOutput rebuilds the graph, keeps states of random
generators and compiles C++ at run time.)
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP

from hrm_megatron.layers.functions import (
    GatedFunction,
    fused_on_a_gpu,
    gated,
    gated_gradients,
    run,
    swiglu,
    swiglu_gradient,
)
from hrm_megatron.transformer_config import HRMConfig


class GatedActivation:
    """A product of factors and the gradients of these, each one kernel on a GPU."""

    def __init__(self, formula: Callable[..., torch.Tensor], gradients: Callable[..., Any]) -> None:
        def recompute(first: torch.Tensor, *others_and_out: torch.Tensor) -> None:
            others_and_out[-1].copy_(formula(first, *others_and_out[:-1]))

        self.formula, self.gradients, self.recompute = map(fused_on_a_gpu, (formula, gradients, recompute))


SWIGLU, GATED = GatedActivation(swiglu, swiglu_gradient), GatedActivation(gated, gated_gradients)


class DiscardedOutput:
    """The storage of one gated activation: freed after the layer that reads it, recomputed for its backward."""

    def __init__(self, activation: GatedActivation) -> None:
        self.activation = activation
        self.factors: tuple[torch.Tensor, ...] = ()

    def of(self, *factors: torch.Tensor) -> torch.Tensor:
        """Compute the product."""
        product: torch.Tensor = DiscardedFunction.apply(self, *factors)
        # `data` has a version counter of its own: autograd need not know that the storage is filled again.
        self.product, self.factors = product.data, tuple(factor.detach() for factor in factors)
        return product

    def discard_until_backward_of(self, out: torch.Tensor) -> None:
        """Free the storage now, until the gradient of `out`, the result of what has read it, is known."""
        self.discard()
        if out.requires_grad:
            out.register_hook(self.recompute)

    def discard(self) -> None:
        self.product.untyped_storage().resize_(0)

    def recompute(self, _: torch.Tensor) -> None:
        self.product.untyped_storage().resize_(self.product.nbytes)
        self.activation.recompute(*self.factors, self.product)


class DiscardedFunction(torch.autograd.Function):
    """The product as autograd sees it; its backward comes after that of what has read it."""

    @staticmethod
    def forward(ctx: Any, discarded: DiscardedOutput, *factors: torch.Tensor) -> torch.Tensor:
        ctx.discarded = discarded
        ctx.save_for_backward(*factors)
        return discarded.activation.formula(*factors)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        ctx.discarded.discard()
        ctx.discarded.factors = ()
        gradients = ctx.discarded.activation.gradients(grads[0], *ctx.saved_tensors)
        return None, *(gradients if isinstance(gradients, tuple) else (gradients,))


class GatedAttention(SelfAttention):  # type: ignore[misc]
    """Megatron's attention with an output gate."""

    def get_query_key_value_tensors(self, *arguments: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        """Queries, keys, values and gate; the gate is copied, so it does not keep the fused QKV buffer alive.

        The compiled product keeps its inputs, and a view of the projection would keep all four of them.
        """
        *others, gate = super().get_query_key_value_tensors(*arguments, **options)
        return *others, gate.contiguous()

    def _apply_output_gate(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        if not self.config.recompute_gated_act:
            own = not x.is_cuda and not torch.compiler.is_compiling()  # on a GPU Megatron's is one kernel
            gated_x: torch.Tensor = (run(GatedFunction, x, gate.view(x.shape)) if own
                                     else super()._apply_output_gate(x, gate))
            return gated_x
        self.discarded = DiscardedOutput(GATED)
        return self.discarded.of(x, gate.view(x.shape))

    def forward(self, *arguments: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend as Megatron does."""
        out, bias = super().forward(*arguments, **options)
        if self.config.recompute_gated_act:
            self.discarded.discard_until_backward_of(out)
            del self.discarded
        return out, bias


class RecomputedSwiGLU(torch.nn.Module):
    """The activation of the MLP below, [s, b, 2 * ffn/tp] to [s, b, ffn/tp]."""

    def __init__(self, config: HRMConfig) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.discarded = DiscardedOutput(SWIGLU)
        return self.discarded.of(x)


class RecomputingMLP(MLP):  # type: ignore[misc]
    """Megatron's MLP around an activation whose result is recomputed."""

    def forward(self, *arguments: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [s, b, h] to [s, b, h], and no bias."""
        out, bias = super().forward(*arguments, **options)
        self.activation_func.discarded.discard_until_backward_of(out)
        del self.activation_func.discarded
        return out, bias
