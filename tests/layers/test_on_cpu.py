"""Loops of a CPU against the formulas that they stand for."""
from __future__ import annotations

import numpy as np
import pytest
import torch

from hrm_megatron.layers import on_cpu
from hrm_megatron.layers.functions import (
    gated,
    gated_gradients,
    normalize,
    normalize_backward,
    rms_norm,
    swiglu,
    swiglu_gradient,
)
from hrm_megatron.layers.on_cpu import (
    gated_gradients_in_loops,
    gated_in_loops,
    norm_gradient_in_loops,
    norm_in_loops,
    swiglu_gradient_in_loops,
    swiglu_in_loops,
)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_each_is_its_formula(monkeypatch: pytest.MonkeyPatch, layout: str, threads: int) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(on_cpu, "DIVIDED_BYTES", 1)
    generator = torch.Generator().manual_seed(4)
    x, grad = (torch.randn(7, 2, width, generator=generator) * 3 for width in (44, 22))
    if layout == "transposed":
        x, grad = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, grad))
    # fp32 rounds to 2^-24 of a result: a sum of squares in two orders and a root; e^x moves by |x| < 16 of it more. The
    # gradient's terms are below 100, and may cancel.
    torch.testing.assert_close(norm_in_loops(x, 1e-6), rms_norm(x, 1e-6), rtol=8 * 2 ** -24, atol=0)
    torch.testing.assert_close(swiglu_in_loops(x), swiglu(x), rtol=32 * 2 ** -24, atol=0)
    torch.testing.assert_close(swiglu_gradient_in_loops(grad, x), swiglu_gradient(grad, x), rtol=32 * 2 ** -24,
                               atol=100 * 2 ** -24)
    rough, rough_grad = x.bfloat16(), grad.bfloat16()  # computed in fp32 and rounded once: 2^-7 to the next neighbour
    torch.testing.assert_close(norm_in_loops(rough, 1e-6), rms_norm(rough, 1e-6), rtol=2 ** -7, atol=0)
    torch.testing.assert_close(swiglu_in_loops(rough), swiglu(rough), rtol=2 ** -7, atol=0)
    torch.testing.assert_close(swiglu_gradient_in_loops(rough_grad, rough), swiglu_gradient(rough_grad, rough),
                               rtol=2 ** -7, atol=100 * 2 ** -24)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_gates_and_gradients_are_their_formulas(layout: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    x, gate, grad = ((torch.randn(7, 2, 44, generator=generator) * 3).to(dtype) for _ in range(3))
    y, factors = normalize(x, 1e-6)
    if layout == "transposed":
        x, gate, grad = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, gate, grad))
    # Products of three factors that are below 16 each, of which a sigmoid is wrong by 4 * 2^-24 (below); a difference
    # of such, and a mean of 44. bfloat16 rounds the result once, 2^-7 to the next neighbour.
    bounds = dict(rtol=2 ** -7 if dtype == torch.bfloat16 else 8 * 2 ** -24, atol=16 * 16 * 4 * 2 ** -24)
    torch.testing.assert_close(gated_in_loops(x, gate), gated(x, gate), **bounds)
    for ours, theirs in zip(gated_gradients_in_loops(grad, x, gate), gated_gradients(grad, x, gate), strict=True):
        torch.testing.assert_close(ours, theirs, **bounds)
    torch.testing.assert_close(norm_gradient_in_loops(grad, y, factors), normalize_backward(grad, y, factors), **bounds)
    found = torch.empty_like(factors)
    norm_in_loops(x, 1e-6, found)
    torch.testing.assert_close(found, factors, rtol=8 * 2 ** -24, atol=0)


def test_what_is_not_finite_stays_so() -> None:
    x = torch.tensor([[float("nan"), float("inf"), -float("inf"), 1, 1, 1]])
    assert not swiglu_in_loops(x).isfinite().any() and not swiglu(x).isfinite().any()
    assert not swiglu_gradient_in_loops(torch.ones(1, 3), x)[0, :3].isfinite().any()
    assert norm_in_loops(x, 1e-6).isnan().any()
    ones = torch.ones_like(x)
    assert not norm_gradient_in_loops(ones, x, torch.ones(1, 1)).isfinite().any()
    assert not gated_in_loops(x, ones)[0, :3].isfinite().any() and gated_in_loops(ones, x)[0, 0].isnan()
    # A gate of infinity is open or shut, but for e^-87.
    torch.testing.assert_close(gated_in_loops(ones, x)[0, 1:3], gated(ones, x)[0, 1:3], rtol=0, atol=1e-37)


def test_exponentials_and_sigmoids_are_those_of_numpy():
    import numba

    from hrm_megatron.layers import loops

    @numba.njit(fastmath=loops.ANY_ORDER)
    def both(x, exponentials, sigmoids):
        for i in range(x.size):
            exponentials[i], sigmoids[i] = loops.exp_of_negative(-abs(x[i])), loops.sigmoid(x[i])
    x = np.concatenate([np.linspace(-100, 100, 40_001), [0.0, np.nan]]).astype(np.float32)
    exponentials, sigmoids = np.empty_like(x), np.empty_like(x)
    both(x, exponentials, sigmoids)
    wide = x.astype(np.float64)[:-1]
    # x * log2(e) is rounded to 2^-24 of itself, which moves e^x by |x| e^x 2^-24 < 0.4 * 2^-24; a few roundings more
    assert np.abs(exponentials[:-1] - np.exp(-np.abs(wide))).max() < 4 * 2.0 ** -24
    assert np.abs(sigmoids[:-1] - 1 / (1 + np.exp(-wide))).max() < 4 * 2.0 ** -24
    assert np.isnan(exponentials[-1]) and np.isnan(sigmoids[-1])
