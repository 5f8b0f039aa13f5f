"""Layers that save less for backward: a gate that does not keep the fused QKV buffer alive and, with
--recompute-modules gated_act, recompute of gated activations.

SwiGLU and attention's output gate are products of factors that are saved anyway. The linear layer that reads such a
product saves it for its weight gradient. Here its storage is freed once that layer has run, and refilled from the
factors when the gradient of the layer's output arrives. No graph is rebuilt and no layer is aware of it: the tensor
object stays, its storage is freed and refilled. (Megatron's CheckpointWithoutOutput rebuilds the graph, saves RNG
states and compiles C++ at run time.)
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
    """A product of factors and the gradients of the factors, one kernel each on a GPU."""

    def __init__(self, formula: Callable[..., torch.Tensor], gradients: Callable[..., Any]) -> None:
        def recompute(first: torch.Tensor, *others_and_out: torch.Tensor) -> None:
            others_and_out[-1].copy_(formula(first, *others_and_out[:-1]))

        self.formula, self.gradients, self.recompute = map(fused_on_a_gpu, (formula, gradients, recompute))


SWIGLU, GATED = GatedActivation(swiglu, swiglu_gradient), GatedActivation(gated, gated_gradients)


class DiscardedOutput:
    """Storage of one gated activation: freed after the layer that reads it has run, recomputed for that layer's
    backward."""

    def __init__(self, activation: GatedActivation) -> None:
        self.activation = activation
        self.factors: tuple[torch.Tensor, ...] = ()

    def of(self, *factors: torch.Tensor) -> torch.Tensor:
        """Return the product of the factors."""
        product: torch.Tensor = DiscardedFunction.apply(self, *factors)
        # `data` has its own version counter, so autograd does not see that the storage is refilled.
        self.product, self.factors = product.data, tuple(factor.detach() for factor in factors)
        return product

    def discard_until_backward_of(self, out: torch.Tensor) -> None:
        """Free the storage until the gradient of `out`, the output of the layer that read it, arrives."""
        self.discard()
        if out.requires_grad:
            out.register_hook(self.recompute)

    def discard(self) -> None:
        self.product.untyped_storage().resize_(0)

    def recompute(self, _: torch.Tensor) -> None:
        self.product.untyped_storage().resize_(self.product.nbytes)
        self.activation.recompute(*self.factors, self.product)


class DiscardedFunction(torch.autograd.Function):
    """The product as autograd sees it; its backward runs after that of the layer that read it."""

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
        """Return queries, keys, values and gate. The gate is copied, so it does not keep the fused QKV buffer alive.

        The compiled product saves its inputs, and a view would hold the whole projection.
        """
        *others, gate = super().get_query_key_value_tensors(*arguments, **options)
        return *others, gate.contiguous()

    def _apply_output_gate(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        if not self.config.recompute_gated_act:
            own = not x.is_cuda and not torch.compiler.is_compiling()  # Megatron's is one kernel on a GPU
            gated_x: torch.Tensor = (run(GatedFunction, x, gate.view(x.shape)) if own
                                     else super()._apply_output_gate(x, gate))
            return gated_x
        self.discarded = DiscardedOutput(GATED)
        return self.discarded.of(x, gate.view(x.shape))

    def forward(self, *arguments: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run Megatron's forward, then free the gated result if it is recomputed."""
        out, bias = super().forward(*arguments, **options)
        if self.config.recompute_gated_act:
            self.discarded.discard_until_backward_of(out)
            del self.discarded
        return out, bias


class RecomputedSwiGLU(torch.nn.Module):
    """The activation of RecomputingMLP, [s, b, 2 * ffn/tp] to [s, b, ffn/tp]."""

    def __init__(self, config: HRMConfig) -> None:
        super().__init__()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.discarded = DiscardedOutput(SWIGLU)
        return self.discarded.of(x)


class RecomputingMLP(MLP):  # type: ignore[misc]
    """Megatron's MLP with an activation whose result is recomputed."""

    def forward(self, *arguments: Any, **options: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [s, b, h] to [s, b, h]; the bias is None."""
        out, bias = super().forward(*arguments, **options)
        self.activation_func.discarded.discard_until_backward_of(out)
        del self.activation_func.discarded
        return out, bias
