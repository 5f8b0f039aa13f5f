"""The element-wise functions against autograd over their formulas, in fp32 and rounded from bf16."""
import inspect
from types import SimpleNamespace

import pytest
import torch

from hrm_megatron.parallel.cpu import activate

activate()

from megatron.core import jit  # noqa: E402

from hrm_megatron.layers import functions, gated_recompute  # noqa: E402
from hrm_megatron.layers.functions import (  # noqa: E402
    GatedFunction,
    RMSNormFunction,
    RotateFunction,
    SwiGLUFunction,
)

ANGLES = torch.arange(7)[:, None, None, None] * torch.tensor([1.0, 0.1, 0.01])
COS, SIN = torch.cat((ANGLES.cos(), ANGLES.cos()), -1), ANGLES.sin()


CASES = {
    "swiglu": (SwiGLUFunction.apply, functions.swiglu, (7, 2, 10)),
    "rms_norm": (lambda x: RMSNormFunction.apply(x, 1e-6), lambda x: functions.rms_norm(x, 1e-6), (7, 2, 6)),
    "gated": (lambda x: GatedFunction.apply(*x.chunk(2, -1)), lambda x: functions.gated(*x.chunk(2, -1)), (7, 2, 10)),
    "rotate": (lambda x: RotateFunction.apply(COS, SIN, x)[0], lambda x: functions.rotated(x, COS, SIN), (7, 2, 3, 6)),
}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_equal_the_formula(name, dtype, tolerance):
    # fp32: another order of operations on values around 1; bf16: rounding of the result, 2^-8, and of what is kept.
    function, formula, shape = CASES[name]
    generator = torch.Generator().manual_seed(1)
    x, probe = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    results = []
    for f in (function, formula):
        leaf = x.clone().requires_grad_()
        out = f(leaf)
        results.append((out, *torch.autograd.grad((out * probe[..., :out.shape[-1]]).sum(), leaf)))
    for have, want in zip(*results, strict=True):
        assert have.dtype == dtype
        assert (have.float() - want.float()).abs().max() <= tolerance * want.float().abs().max()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])  # one rounding: 2^-8
@pytest.mark.parametrize("formula, gradients, shapes", [
    (functions.swiglu, functions.swiglu_gradient, [(7, 2, 10)]),
    (functions.gated, functions.gated_gradients, [(7, 2, 6), (7, 2, 6)])], ids=["swiglu", "gated"])
def test_gradients_of_products(formula, gradients, shapes, dtype, tolerance):
    generator = torch.Generator().manual_seed(1)
    factors = [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]
    wide = [factor.detach().double().requires_grad_() for factor in factors]
    out = formula(*factors)
    grad = torch.randn(out.shape, generator=generator).to(dtype)
    wanted = torch.autograd.grad((formula(*wide) * grad.double()).sum(), wide)
    have = gradients(grad, *(factor.detach() for factor in factors))
    for ours, theirs in zip(have if isinstance(have, tuple) else (have,), wanted, strict=True):
        assert ours.dtype == dtype
        assert (ours.double() - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_a_row_of_zeros_has_a_finite_norm_and_gradient():
    x = torch.zeros(2, 5, requires_grad=True)
    y = RMSNormFunction.apply(x, 1e-6)
    y.sum().backward()
    assert (y == 0).all() and torch.isfinite(x.grad).all()


@pytest.fixture
def traced(monkeypatch):
    """Run a function as the one graph that a GPU would compile, by the operations that were traced."""
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)

    def traced(function, *arguments):
        graphs = []

        def backend(graph, _):
            graphs.append(graph)
            return graph.forward
        out = torch.compile(inspect.unwrap(function), fullgraph=True, backend=backend)(*arguments)
        assert len(graphs) == 1
        return out
    return traced


def draw(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("function, arguments", [
    (functions.rotate, (COS, SIN, False, draw(7, 2, 3, 6), draw(7, 2, 1, 6))),
    (functions.rotate, (COS, SIN, True, draw(7, 2, 3, 6), draw(7, 2, 1, 6))),
    (functions.normalize, (draw(7, 2, 6), 1e-6)),
    (functions.normalize_backward, (draw(7, 2, 6), draw(7, 2, 6).flip(0), draw(7, 2, 1).abs()))],
    ids=["rotate", "rotate back", "normalize", "normalize backward"])
def test_each_is_one_graph_for_a_compiler(traced, function, arguments):
    have, want = traced(function, *arguments), function(*arguments)
    for ours, theirs in zip(*((out if type(out) is tuple else (out,)) for out in (have, want)), strict=True):
        assert (ours - theirs).abs().max() <= 1e-6  # another order of sums, or an ulp of values up to 5


@pytest.mark.parametrize("kind, factors", [(gated_recompute.SWIGLU, 1), (gated_recompute.GATED, 2)],
                         ids=["swiglu", "gated"])
def test_gated_activations_are_one_graph_each_and_recomputed_in_place(traced, kind, factors):
    inputs = [draw(7, 2, 10).roll(i, 0).to(torch.bfloat16) for i in range(factors)]
    product = kind.formula(*inputs)
    again = torch.zeros_like(product)
    traced(kind.recompute, *inputs, again)
    assert torch.equal(traced(kind.formula, *inputs), product) and torch.equal(again, product)
    have, want = traced(kind.gradients, product, *inputs), kind.gradients(product, *inputs)
    for ours, theirs in zip(*((out if type(out) is tuple else (out,)) for out in (have, want)), strict=True):
        assert torch.equal(ours, theirs)


def test_what_is_on_a_gpu_is_compiled(monkeypatch):
    compiled = []
    monkeypatch.setattr(jit, "jit_fuser", lambda function: lambda *arguments: compiled.append((function, arguments)))
    double = functions.fused_on_a_gpu(lambda x, factor: factor * x)
    assert torch.equal(double(torch.ones(2), 2), torch.full((2,), 2.0)) and not compiled
    on_a_gpu = SimpleNamespace(is_cuda=True)
    double(on_a_gpu, 3)
    assert [arguments for _, arguments in compiled] == [(on_a_gpu, 3)]
