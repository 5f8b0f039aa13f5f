"""Gradients of weights through Apex's kernels: found where they are, called as they want to be by all of our layers."""
import functools
import importlib
import sys
import types

import pytest
import torch

from hrm_megatron.parallel import cpu, main_grad, processor
from hrm_megatron.parallel.main_grad import APEX, Apex, add_weight_gradient, find_apex

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


class ApexOnCpu(types.ModuleType):
    """What csrc/megatron/fused_weight_gradient_dense*.cu do: they take addresses and sizes, and look at no stride."""

    def __init__(self):
        super().__init__(APEX)
        self.calls = []

    def wgrad_gemm_accum_fp32(self, x, grad, total):
        assert total.dtype == FP32 and x.dtype in (FP32, BF16, FP16)
        self._add(x, grad, total, "fp32")

    def wgrad_gemm_accum_fp16(self, x, grad, total):
        assert total.dtype == x.dtype and x.dtype in (BF16, FP16)
        self._add(x, grad, total, "fp16")

    def _add(self, x, grad, total, name):
        assert grad.dtype == x.dtype
        (m, k), n = x.shape, len(total)
        flat_x, flat_grad, flat_total = (t.as_strided(shape, (shape[1], 1))
                                         for t, shape in ((x, (m, k)), (grad, (m, n)), (total, (n, k))))
        flat_total.copy_(flat_total.double() + flat_grad.double().t() @ flat_x.double())
        self.calls.append(name)


@pytest.fixture
def apex(monkeypatch):
    kernels = ApexOnCpu()
    monkeypatch.setattr(main_grad, "find_apex", lambda: Apex(kernels))
    monkeypatch.setattr(main_grad, "APEX_DEVICE", "cpu")
    return kernels


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[0]))


@pytest.mark.parametrize(("total", "grad", "kernel"), [
    (FP32, BF16, ["fp32"]), (FP32, FP16, ["fp32"]), (FP32, FP32, ["fp32"]), (BF16, BF16, ["fp16"]),
    (FP16, FP16, ["fp16"]), (torch.float64, torch.float64, []), (BF16, FP32, [])])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded"])
def test_each_kernel_gets_what_it_takes(apex, total, grad, kernel, layout):
    m, n, k = 6, 5, 3
    x, g = draw(m, k).to(grad), draw(m, n).to(grad)
    if layout == "transposed":
        x, g = x.t().contiguous().t(), g.t().contiguous().t()
    elif layout == "expanded":
        g = g[:1].expand(m, n)
    assert (x.is_contiguous() and g.is_contiguous()) == (layout == "contiguous")
    buffer = torch.ones(n, k, dtype=total)
    add_weight_gradient(buffer, g, x)
    wanted = 1 + g.double().t() @ x.double()
    # Sums of six products, below 8, rounded to the buffer's bits; where torch multiplies in them, each term is.
    bits = {BF16: 8, FP16: 11}.get(total, 20)
    torch.testing.assert_close(buffer.double(), wanted, rtol=0, atol=8 * 2.0**-bits)
    assert apex.calls == kernel


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch without oneDNN")
@pytest.mark.parametrize(("total", "grad"), [(FP32, FP32), (FP32, BF16), (torch.float64, FP32)])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded"])
@pytest.mark.parametrize("n, k", [(5, 3), (3, 5)])
def test_a_processor_of_onednn_adds_the_same(monkeypatch, total, grad, layout, n, k):
    monkeypatch.setattr(processor, "ON_ONEDNN", True)
    monkeypatch.setattr(processor, "MIN_MULTIPLICATIONS", 0)
    m = 6
    x, g = draw(m, k).to(grad), draw(m, n).to(grad)
    if layout == "transposed":
        x, g = x.t().contiguous().t(), g.t().contiguous().t()
    elif layout == "expanded":
        x, g = x[:, :1].expand(m, k), g[:1].expand(m, n)
    buffer = torch.ones(n, k, dtype=total)
    add_weight_gradient(buffer, g, x)
    # Sums of six products, below 16.
    torch.testing.assert_close(buffer.double(), 1 + g.double().t() @ x.double(), rtol=0, atol=16 * 2.0**-20)


def test_a_linear_layer_of_ours_and_the_head_use_them(apex, single_rank, monkeypatch):
    from hrm_megatron.layers.linear import linear
    from hrm_megatron.model.head import LabelScores

    x, weight = draw(4, 2, 3).requires_grad_(), draw(5, 3).requires_grad_()
    weight.main_grad = torch.full((5, 3), 0.5)
    linear(x, weight, fusion=True).sum().backward()  # the gradient of a sum is expanded from one number
    assert apex.calls == ["fp32"]
    torch.testing.assert_close(weight.main_grad, 0.5 + x.detach().sum((0, 1)).expand(5, 3))

    labels, buffers = torch.tensor([1, 0, 4, 2]), [torch.zeros(5, 3) for _ in range(2)]
    one_rank = types.SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    for buffer, kernels in zip(buffers, (apex, None), strict=True):
        monkeypatch.setattr(main_grad, "find_apex", lambda kernels=kernels: Apex(kernels))
        rows = x.detach()[:, 0].clone().requires_grad_()
        LabelScores.apply(rows, weight, labels, 3, one_rank, buffer)[0].sum().backward()
    assert apex.calls == ["fp32"] * 3  # two chunks
    torch.testing.assert_close(*buffers)


def test_a_compiled_layer_does_not(apex, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    buffer = torch.zeros(5, 3)
    add_weight_gradient(buffer, draw(4, 5), draw(4, 3))
    assert buffer.any() and not apex.calls


@pytest.mark.parametrize(("cuda", "source", "missing", "ours"), [
    (True, "wgrad_gemm_accum_fp32 = print", None, False),
    (True, None, "not installed", True),
    (True, "raise ImportError('undefined symbol: _ZN3c105')",
     "its import fails (ImportError: undefined symbol: _ZN3c105)", True),
    (False, "wgrad_gemm_accum_fp32 = print", "no CUDA device", True)])
def test_what_is_found_is_used_and_what_fails_has_a_stand_in(monkeypatch, tmp_path, cuda, source, missing, ours):
    monkeypatch.setitem(sys.modules, APEX, None)  # so that what comes there now goes again
    monkeypatch.delitem(sys.modules, APEX)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    if source:
        (tmp_path / f"{APEX}.py").write_text(source)
    fresh = functools.cache(find_apex.__wrapped__)
    monkeypatch.setattr(cpu, "find_apex", fresh)
    cpu._provide_weight_gradients()
    assert fresh().missing == missing and (fresh().kernels is None) == ours  # the stand-in is not taken for Apex
    assert hasattr(sys.modules[APEX], "__file__") != ours
    assert callable(importlib.import_module(APEX).wgrad_gemm_accum_fp32)


@pytest.mark.gpu
@pytest.mark.parametrize(("total", "grad"), [(FP32, BF16), (FP32, FP32), (BF16, BF16)])
def test_the_real_kernels_do_the_same(total, grad):
    if find_apex().missing:
        pytest.skip(f"Apex's fused weight gradient: {find_apex().missing}")
    x, g, buffer = draw(256, 64).cuda().to(grad), draw(256, 128).cuda().to(grad), torch.ones(128, 64).cuda().to(total)
    add_weight_gradient(buffer, g.t().contiguous().t(), x)
    wanted = 1 + g.double().t() @ x.double()
    # 256 products of numbers around 1: sums to 2^6, rounded once to the buffer's bits; TF32 has 10.
    torch.testing.assert_close(buffer.double(), wanted, rtol=0, atol=2**6 * (2**-8 if BF16 in (total, grad) else 2**-9))
