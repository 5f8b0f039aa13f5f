from __future__ import annotations

import pytest
import torch

from hrm_megatron.convert.low_bit import Scheme
from hrm_megatron.quantize.hessians import Moments
from hrm_megatron.quantize.rounding import DAMPING, aligned, round_by_hessian, round_plainly

OUT, IN = 5, 192  # more columns than are updated at once


@pytest.fixture
def problem():
    """A matrix, correlated inputs [n, in] of a full model, and those of a quantized one."""
    generator = torch.Generator().manual_seed(7)
    mixing = torch.randn(IN, IN, generator=generator, dtype=torch.float64)
    full = torch.randn(400, IN, generator=generator, dtype=torch.float64) @ mixing
    quantized = full + 0.3 * torch.randn(400, IN, generator=generator, dtype=torch.float64)
    return torch.randn(OUT, IN, generator=generator), full, quantized


def damped(hessian):
    return hessian + DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)


@pytest.mark.parametrize("scheme", [Scheme("int4", 32), Scheme("int8", 0), Scheme("mxfp4", 32)], ids=str)
def test_each_column_is_the_best_answer_to_the_codes_before_it(problem, scheme):
    weight, full, _ = problem
    hessian = full.t() @ full
    found = round_by_hessian(weight, hessian, scheme)
    h, w, chosen = damped(hessian), weight.double(), found.matrix.dequantized().double()
    per_column = found.matrix.scales.double().repeat_interleave(IN // found.matrix.scales.shape[1], 1) * scheme.unit
    for column in (0, 1, 31, 32, 127, 128, IN - 1):
        # The minimum over the columns from here on, of those before being fixed, solved at once.
        lost = chosen[:, :column] - w[:, :column]
        best = w[:, column:] - torch.linalg.solve(h[column:, column:], h[column:, :column] @ lost.t()).t()
        torch.testing.assert_close(found.steps[:, column].double() * per_column[:, column], best[:, 0],
                                   rtol=1e-5, atol=1e-6)  # `steps` are kept in fp32
    assert torch.equal(scheme.nearest(found.steps), found.matrix.codes.float())


def test_it_loses_less_than_plain_rounding(problem):
    weight, full, _ = problem
    scheme = Scheme("int4", 32)

    def lost(matrix):
        return float((full @ (matrix.dequantized() - weight).double().t()).square().sum())
    assert lost(round_by_hessian(weight, full.t() @ full, scheme).matrix) < 0.5 * lost(round_plainly(weight, scheme))


def test_the_target_answers_other_inputs_as_the_full_model_answers_its_own(problem):
    weight, full, quantized = problem
    moments = Moments(quantized.t() @ quantized, full.t() @ quantized)
    pull = (DAMPING * moments.hessian.diagonal().mean()).sqrt()  # each weight towards its own value, so strongly
    w = weight.double()
    best = torch.linalg.lstsq(torch.cat([quantized, pull * torch.eye(IN, dtype=torch.float64)]),
                              torch.cat([full @ w.t(), pull * w.t()])).solution.t()
    torch.testing.assert_close(aligned(weight, moments).double(), best, rtol=1e-5, atol=1e-6)  # fp32 comes back


def test_an_input_that_is_always_zero_does_no_harm():
    weight = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    found = round_by_hessian(weight, torch.zeros(64, 64, dtype=torch.float64), Scheme("int4", 32))
    assert found.matrix.dequantized().isfinite().all()
