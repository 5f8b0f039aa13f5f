"""Gradients that layers add to `main_grad`, the buffer of Megatron's DDP, by themselves: those of each tick apart."""
from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch

APEX_WEIGHT_GRADIENTS = "fused_weight_gradient_mlp_cuda"
# Looked for before parallel/cpu.py puts a stand-in of that name where Megatron's own layers find it.
HAS_APEX = importlib.util.find_spec(APEX_WEIGHT_GRADIENTS) is not None


def add_weight_gradient(main_grad: torch.Tensor, grad: torch.Tensor, x: torch.Tensor) -> None:
    """main_grad [n, k] += grad^T x for grad [m, n] and x [m, k], in the precision of `main_grad`."""
    if main_grad.device.type != "cuda":
        main_grad.addmm_(grad.t().to(main_grad.dtype), x.to(main_grad.dtype))
    elif HAS_APEX and main_grad.dtype == torch.float32 and not torch.compiler.is_compiling():
        # It reads memory from end to end, whatever the strides.
        _apex().wgrad_gemm_accum_fp32(x.contiguous(), grad.contiguous(), main_grad)
    elif main_grad.dtype != grad.dtype:  # a product into a wider type exists there
        torch.addmm(main_grad, grad.t(), x, out_dtype=main_grad.dtype, out=main_grad)
    else:
        main_grad.addmm_(grad.t(), x)


def _apex() -> Any:
    return importlib.import_module(APEX_WEIGHT_GRADIENTS)


def already_added(weight: torch.Tensor) -> torch.Tensor:
    """Tell DDP that the gradient of `weight` is in the buffer; returns what an autograd function answers in its place.

    DDP's hooks demand that a gradient was there; this one takes no memory.
    """
    if not torch.compiler.is_compiling():  # which takes no notes on weights; a compiled layer makes them beforehand
        weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return weight.new_zeros(()).expand_as(weight)
