from __future__ import annotations

import itertools

import pytest
import torch

from hrm_megatron.convert.low_bit import LowBit, Scheme
from hrm_megatron.convert.quantization import Quantization
from hrm_megatron.data.dataset import PackedRows
from hrm_megatron.data.indexed_examples import IndexedExamples
from hrm_megatron.quantize.methods import Calibration, Quantizer
from hrm_megatron.quantize.recurrence import batches
from hrm_megatron.quantize.rounding import Rounded
from hrm_megatron.quantize.scores import score
from hrm_megatron.quantize.tuning import TunedMatrix, Tuning
from tests.quantize.conftest import ROW_TOKENS

ROWS, STEPS = 8, 30


@pytest.fixture(scope="module")
def calibration(architecture, store):
    rows = PackedRows(IndexedExamples(store), ROW_TOKENS, 3, ROWS + 2 * STEPS)

    def stacked(numbers):
        return batches((rows[i] for i in numbers), architecture, 2, torch.device("cpu"))
    return Calibration(lambda: stacked(range(ROWS)), lambda: stacked(itertools.count(ROWS)))


def test_gradients_are_those_of_a_matrix_without_rounding():
    scheme = Scheme("int4", 32)
    generator = torch.Generator().manual_seed(1)
    steps = torch.rand(3, 64, generator=generator) * 12 - 6
    scales = (torch.rand(3, 2, generator=generator) + 0.5).bfloat16().float()
    tuned = TunedMatrix(Rounded(LowBit(scheme.nearest(steps).to(torch.int8), scales, scheme), steps))
    grad = torch.randn(3, 64, generator=generator)
    tuned.take_gradient(grad)
    offset, factor = torch.zeros(3, 64, requires_grad=True), torch.ones(3, 2, requires_grad=True)
    matrix = (tuned.matrix().codes + offset) * (scales * factor).repeat_interleave(32, 1)
    expected = torch.autograd.grad((matrix * grad).sum(), (offset, factor))
    torch.testing.assert_close((tuned.offset.grad, tuned.factor.grad), expected)


def test_all_ticks_and_tuning_lose_least(architecture, weights, calibration, store):
    """Of a model with random weights, which reacts less to a change than a trained one."""
    schemes = Quantization(Scheme("int4", 32), Scheme("int8", 0))
    quantizer = Quantizer(architecture, weights, schemes, torch.bfloat16)
    ways = dict(plain=quantizer.plainly(), first_tick=quantizer.by_first_tick(calibration),
                untuned=quantizer.by_all_ticks(calibration, Tuning(steps=0)),
                tuned=quantizer.by_all_ticks(calibration, Tuning(STEPS, offset_lr=5e-3, scale_lr=1e-3)))
    rows = PackedRows(IndexedExamples(store), ROW_TOKENS, 99, 8)  # packed in another way, at least
    found = score(architecture, weights, {name: quantizer.dequantized(way) for name, way in ways.items()},
                  batches((rows[i] for i in range(8)), architecture, 4, torch.device("cpu")))
    lost = {name: each.divergence for name, each in found.items()}
    assert lost["tuned"] < 0.85 * lost["untuned"] and lost["tuned"] < 0.7 * lost["plain"], lost
    # Random weights hardly tell the first tick from the others.
    assert lost["tuned"] < 0.85 * lost["first_tick"] and max(lost["untuned"], lost["first_tick"]) < lost["plain"], lost


def test_the_same_rows_give_the_same_codes(architecture, weights, calibration):
    def codes():
        quantizer = Quantizer(architecture, weights, Quantization(Scheme("int4", 32)), torch.bfloat16)
        return quantizer.by_all_ticks(calibration, Tuning(steps=2))
    one, other = codes(), codes()
    assert one.keys() == other.keys() and len(one) == 2 * 2 * 4 + 1  # four matrices a layer, and the head
    assert all(torch.equal(one[name].codes, other[name].codes) and torch.equal(one[name].scales, other[name].scales)
               for name in one)
