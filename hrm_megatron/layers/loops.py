"""Norm, gate and SwiGLU compiled by numba for the CPU, and the helpers of such loops. bfloat16 is passed as its bits,
uint16."""
from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numba
import numpy as np
from numba.extending import overload, register_jitable

from hrm_megatron.data.kernels import compiled
from hrm_megatron.layers.threads import on_threads

# fastmath: sums in any order and fused multiply-adds; NaN and infinity stay valid.
ANY_ORDER = {"reassoc", "contract", "arcp", "nsz"}
HALF = np.uint32(0x7FFF)
LOG2_E, LN_2 = np.float32(math.log2(math.e)), np.float32(math.log(2))
SMALLEST = np.float32(-87)  # exp of it is still a normal (not denormal) number
# exp(x) = sum of x^n / n!: the remainder after these terms is below 1e-8 of the sum for |x| <= ln(2) / 2
C1, C2, C3, C4, C5, C6, C7 = (np.float32(1 / math.factorial(n)) for n in range(1, 8))


def loop(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a loop over float32."""
    return compiled(function, ANY_ORDER)


def widened(x: Any) -> Any:
    """Return an element as float32."""
    raise NotImplementedError  # only compiled


def stored(array: Any, x: Any) -> Any:
    """Return the float32 x in the element type of `array`."""
    raise NotImplementedError  # only compiled


@overload(widened)
def _widened(x: Any) -> Any:  # numba compares parameters with their annotations
    def of_bits(x: Any) -> Any:
        return np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)

    def of_float(x: Any) -> Any:
        return x
    return of_bits if x == numba.uint16 else of_float


@overload(stored)
def _stored(array: Any, x: Any) -> Any:
    def as_bits(array: Any, x: Any) -> Any:
        return _rounded(x)

    def as_float(array: Any, x: Any) -> Any:
        return x
    return as_bits if array.dtype == numba.uint16 else as_float


@register_jitable
def _rounded(x: Any) -> Any:
    """Round a float32 to the nearest bfloat16, ties to even, and return its bits."""
    bits = np.float32(x).view(np.uint32)
    return np.uint16((bits + HALF + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16))


@register_jitable
def exp_of_negative(x: Any) -> Any:
    """Return exp(x) of a non-positive float32, to 1e-7 absolute, in a form that the compiler can vectorize."""
    x = SMALLEST if x < SMALLEST else x
    power = x * LOG2_E
    whole = np.int32(power - np.float32(0.5))  # rounds to nearest, since it truncates towards zero
    r = (power - np.float32(whole)) * LN_2
    part = np.float32(1) + r * (C1 + r * (C2 + r * (C3 + r * (C4 + r * (C5 + r * (C6 + r * C7))))))
    return part * np.int32((whole + np.int32(127)) << np.int32(23)).view(np.float32)


@register_jitable
def sigmoid(x: Any) -> Any:
    e = exp_of_negative(-abs(x))
    return (np.float32(1) if x >= 0 else e) / (np.float32(1) + e)


@loop
def norm_part(first: int, last: int, x: Any, epsilon: Any, out: Any, factors: Any) -> None:
    """`norm_rows` for rows [first, last)."""
    h = x.shape[1]
    for row in range(first, last):
        squares = np.float32(0)
        for i in range(h):
            squares += widened(x[row, i]) * widened(x[row, i])
        factor = np.float32(1) / np.sqrt(squares / np.float32(h) + epsilon)
        if factors is not None:
            factors[row] = factor
        for i in range(h):
            out[row, i] = stored(out, widened(x[row, i]) * factor)


@loop
def norm_rows(threads: int, x: Any, epsilon: Any, out: Any, factors: Any) -> None:
    """Write `1 / sqrt(mean(x^2) + epsilon)` of each row of x [n, h] to factors [n] (unless None), and x times that to
    out."""
    on_threads(norm_part, threads, len(x), (x, epsilon, out, factors))


@loop
def norm_gradient_part(first: int, last: int, grad: Any, y: Any, factors: Any, out: Any) -> None:
    """`norm_gradient_rows` for rows [first, last)."""
    h = grad.shape[1]
    for row in range(first, last):
        total = np.float32(0)
        for i in range(h):
            total += widened(grad[row, i]) * widened(y[row, i])
        mean, factor = total / np.float32(h), factors[row]
        for i in range(h):
            out[row, i] = stored(out, (widened(grad[row, i]) - widened(y[row, i]) * mean) * factor)


@loop
def norm_gradient_rows(threads: int, grad: Any, y: Any, factors: Any, out: Any) -> None:
    """Write the gradient of `norm_rows`' x to out [n, h], from its results y and factors and the gradient of y, grad
    [n, h]."""
    on_threads(norm_gradient_part, threads, len(grad), (grad, y, factors, out))


@loop
def gated_part(first: int, last: int, x: Any, gate: Any, out: Any) -> None:
    """`gated_rows` for rows [first, last)."""
    for row in range(first, last):
        for i in range(x.shape[1]):
            out[row, i] = stored(out, widened(x[row, i]) * sigmoid(widened(gate[row, i])))


@loop
def gated_rows(threads: int, x: Any, gate: Any, out: Any) -> None:
    """Write `x * sigmoid(gate)` of x and gate [n, h] to out [n, h]."""
    on_threads(gated_part, threads, len(x), (x, gate, out))


@loop
def gated_gradients_part(first: int, last: int, grad: Any, x: Any, gate: Any, of_x: Any, of_gate: Any) -> None:
    """`gated_gradients_rows` for rows [first, last)."""
    for row in range(first, last):
        for i in range(x.shape[1]):
            s = sigmoid(widened(gate[row, i]))
            g = widened(grad[row, i]) * s
            of_x[row, i] = stored(of_x, g)
            of_gate[row, i] = stored(of_gate, g * widened(x[row, i]) * (np.float32(1) - s))


@loop
def gated_gradients_rows(threads: int, grad: Any, x: Any, gate: Any, of_x: Any, of_gate: Any) -> None:
    """Write the gradients of x and gate [n, h] to of_x and of_gate; grad [n, h] is that of `x * sigmoid(gate)`."""
    on_threads(gated_gradients_part, threads, len(x), (grad, x, gate, of_x, of_gate))


@loop
def swiglu_part(first: int, last: int, x: Any, out: Any) -> None:
    """`swiglu_rows` for rows [first, last)."""
    halves = x.reshape(-1, 2, out.shape[1])
    for row in range(first, last):
        for i in range(out.shape[1]):
            a = widened(halves[row, 0, i])
            out[row, i] = stored(out, a * sigmoid(a) * widened(halves[row, 1, i]))


@loop
def swiglu_rows(threads: int, x: Any, out: Any) -> None:
    """Write `silu(a) * b` of the halves [a | b] of x [n, 2 ffn] to out [n, ffn]."""
    on_threads(swiglu_part, threads, len(x), (x, out))


@loop
def swiglu_gradient_part(first: int, last: int, grad: Any, x: Any, out: Any) -> None:
    """`swiglu_gradient_rows` for rows [first, last)."""
    halves, gradients = x.reshape(-1, 2, grad.shape[1]), out.reshape(-1, 2, grad.shape[1])
    for row in range(first, last):
        for i in range(grad.shape[1]):
            g, a, b = widened(grad[row, i]), widened(halves[row, 0, i]), widened(halves[row, 1, i])
            s = sigmoid(a)
            gradients[row, 0, i] = stored(out, g * b * s * (np.float32(1) + a * (np.float32(1) - s)))
            gradients[row, 1, i] = stored(out, g * a * s)


@loop
def swiglu_gradient_rows(threads: int, grad: Any, x: Any, out: Any) -> None:
    """Write the gradients of the halves [a | b] of x [n, 2 ffn] to out; grad [n, ffn] is that of `silu(a) * b`."""
    on_threads(swiglu_gradient_part, threads, len(x), (grad, x, out))
