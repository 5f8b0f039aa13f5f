"""Gradients that layers add to `main_grad`, the buffer of Megatron's DDP, by themselves: those of each tick apart."""
from __future__ import annotations

import functools
import importlib
from typing import Any, NamedTuple

import torch

APEX = "fused_weight_gradient_mlp_cuda"  # Apex's module of kernels for this
APEX_DEVICE = "cuda"
NARROW = (torch.bfloat16, torch.float16)


class Apex(NamedTuple):
    """Apex's kernels, or why there are none."""

    kernels: Any
    missing: str | None = None


@functools.cache
def find_apex() -> Apex:
    """Import Apex's kernels, the first time before anything stands in for them (parallel/cpu.py)."""
    if not torch.cuda.is_available():
        return Apex(None, "no CUDA device")
    try:
        return Apex(importlib.import_module(APEX))
    except ModuleNotFoundError:
        return Apex(None, "not installed")
    except Exception as error:  # compiled for another torch or CUDA
        return Apex(None, f"its import fails ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})")


def add_weight_gradient(main_grad: torch.Tensor, grad: torch.Tensor, x: torch.Tensor) -> None:
    """main_grad [n, k] += grad^T x for grad [m, n] and x [m, k], in the precision of `main_grad`."""
    # A compiler cannot follow Apex's kernels.
    if not torch.compiler.is_compiling() and main_grad.device.type == APEX_DEVICE and (
            kernel := _apex_kernel(main_grad.dtype, grad.dtype)):
        # They take addresses and sizes, and check nothing (apex, csrc/megatron/fused_weight_gradient_dense_cuda.cu).
        assert main_grad.is_contiguous() and x.dtype == grad.dtype, (main_grad.stride(), x.dtype, grad.dtype)
        kernel(x.contiguous(), grad.contiguous(), main_grad)
    elif main_grad.dtype != grad.dtype and main_grad.device.type == "cuda":  # a product into a wider type exists there
        torch.addmm(main_grad, grad.t(), x, out_dtype=main_grad.dtype, out=main_grad)
    else:
        main_grad.addmm_(grad.t().to(main_grad.dtype), x.to(main_grad.dtype))


def _apex_kernel(total: torch.dtype, grad: torch.dtype) -> Any:
    """Return Apex's kernel that adds products of `grad` to `total`, or None."""
    kernels = find_apex().kernels
    if kernels and total == torch.float32 and grad in (torch.float32, *NARROW):
        return kernels.wgrad_gemm_accum_fp32
    return kernels.wgrad_gemm_accum_fp16 if kernels and total == grad and grad in NARROW else None


def already_added(weight: torch.Tensor) -> torch.Tensor:
    """Tell DDP that the gradient of `weight` is in the buffer; returns what an autograd function answers in its place.

    DDP's hooks demand that a gradient was there; this one takes no memory.
    """
    if not torch.compiler.is_compiling():  # which takes no notes on weights; a compiled layer makes them beforehand
        weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return weight.new_zeros(()).expand_as(weight)
