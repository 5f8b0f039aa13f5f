"""Gradients that layers add directly to `main_grad`, the gradient buffer of Megatron's DDP, once per tick."""
from __future__ import annotations

import functools
import importlib
from typing import Any, NamedTuple

import torch

from hrm_megatron.parallel.processor import multiplies_on_onednn, weight_gradient

APEX = "fused_weight_gradient_mlp_cuda"  # Apex's module with kernels for this
APEX_DEVICE = "cuda"
NARROW = (torch.bfloat16, torch.float16)


class Apex(NamedTuple):
    """Apex's kernels, or the reason why they are missing."""

    kernels: Any
    missing: str | None = None


@functools.cache
def find_apex() -> Apex:
    """Return Apex's kernels; call it first before parallel/cpu.py puts a replacement into sys.modules."""
    if not torch.cuda.is_available():
        return Apex(None, "no CUDA device")
    try:
        return Apex(importlib.import_module(APEX))
    except ModuleNotFoundError:
        return Apex(None, "not installed")
    except Exception as error:  # compiled for another torch or CUDA
        return Apex(None, f"its import fails ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})")


def _add(main_grad: torch.Tensor, grad: torch.Tensor, x: torch.Tensor) -> None:
    if main_grad.dtype != grad.dtype and main_grad.device.type == "cuda":  # CUDA has a matmul with a wider output dtype
        torch.addmm(main_grad, grad.t(), x, out_dtype=main_grad.dtype, out=main_grad)
        return
    grad, x = grad.to(main_grad.dtype), x.to(main_grad.dtype)
    if multiplies_on_onednn(grad.t(), x.t()):  # oneDNN cannot accumulate in place
        main_grad.add_(weight_gradient(grad, x))
    else:
        main_grad.addmm_(grad.t(), x)


# An opaque op for torch.compile, which does not support in-place accumulation into a wider dtype.
_add_when_compiled = torch.library.custom_op("hrm_megatron::add_weight_gradient", _add, mutates_args=("main_grad",))
_add_when_compiled.register_fake(lambda main_grad, grad, x: None)


def add_weight_gradient(main_grad: torch.Tensor, grad: torch.Tensor, x: torch.Tensor) -> None:
    """Add grad^T x to main_grad [n, k] for grad [m, n] and x [m, k], in the precision of `main_grad`."""
    if torch.compiler.is_compiling():  # dynamo cannot trace Apex's kernels either
        _add_when_compiled(main_grad, grad, x)
    elif main_grad.device.type == APEX_DEVICE and (kernel := _apex_kernel(main_grad.dtype, grad.dtype)):
        # They take raw pointers and check nothing (apex, csrc/megatron/fused_weight_gradient_dense_cuda.cu).
        assert main_grad.is_contiguous() and x.dtype == grad.dtype, (main_grad.stride(), x.dtype, grad.dtype)
        kernel(x.contiguous(), grad.contiguous(), main_grad)
    else:
        _add(main_grad, grad, x)


def _apex_kernel(total: torch.dtype, grad: torch.dtype) -> Any:
    """Return Apex's kernel that accumulates matmuls of dtype `grad` into dtype `total`, or None."""
    kernels = find_apex().kernels
    if kernels and total == torch.float32 and grad in (torch.float32, *NARROW):
        return kernels.wgrad_gemm_accum_fp32
    return kernels.wgrad_gemm_accum_fp16 if kernels and total == grad and grad in NARROW else None


def already_added(weight: torch.Tensor) -> torch.Tensor | None:
    """Tell DDP that the gradient of `weight` is in the buffer; return what the autograd function returns as gradient.

    DDP's hooks need a gradient to fire in the thread that runs the layers: without one autograd would call them from
    another thread, where they would start collectives out of order. So the first call in a backward pass returns zeros
    that take no memory. The later ones return None, because autograd would sum such zeros as dense tensors.
    """
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    backward = torch._C._current_graph_task_id()  # a recomputed tick has another id
    if weight.grad is not None or getattr(weight, "placeholder_of", None) == backward:
        return None
    weight.placeholder_of = backward  # type: ignore[attr-defined]
    return torch._efficientzerotensor(weight.shape, dtype=weight.dtype, device=weight.device)


class GradientsAdded(torch.autograd.Function):
    """Return a layer's output unchanged; in backward report `weights`, whose gradients the layer adds to `main_grad`,
    to DDP."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
        ctx.weights = weights
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return grads[0], *map(already_added, ctx.weights)


def answer_once(out: torch.Tensor, weight: torch.Tensor) -> None:
    """Replace the gradient of `weight` that the third-party autograd function of `out` returns by that of
    `already_added`: the function adds to `main_grad` itself."""
    if (node := out.grad_fn) is None:
        return
    places = [place for place, (source, _) in enumerate(node.next_functions)
              if getattr(source, "variable", None) is weight]

    def replace(gradients: tuple[torch.Tensor | None, ...], _: Any) -> tuple[torch.Tensor | None, ...]:
        return tuple(already_added(weight) if place in places else gradient
                     for place, gradient in enumerate(gradients))
    if places:
        node.register_hook(replace)
