"""The element-wise functions against autograd over their formulas, in fp32 and rounded from bf16."""
import pytest
import torch
import torch.nn.functional as F

from hrm_megatron.model.functions import RMSNormFunction, RotateFunction, SwiGLUFunction


def swiglu(x):
    a, b = x.float().chunk(2, -1)
    return (F.silu(a) * b).to(x.dtype)


def rms_norm(x):
    wide = x.float()
    return (wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()).to(x.dtype)


ANGLES = torch.arange(7)[:, None, None, None] * torch.tensor([1.0, 0.1, 0.01])
COS, SIN = torch.cat((ANGLES.cos(), ANGLES.cos()), -1), ANGLES.sin()


def rotate(x):
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * ANGLES.cos() - b * SIN, b * ANGLES.cos() + a * SIN), -1).to(x.dtype)


CASES = {
    "swiglu": (SwiGLUFunction.apply, swiglu, (7, 2, 10)),
    "rms_norm": (lambda x: RMSNormFunction.apply(x, 1e-6), rms_norm, (7, 2, 6)),
    "rotate": (lambda x: RotateFunction.apply(x, COS, SIN), rotate, (7, 2, 3, 6)),
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


def test_a_row_of_zeros_has_a_finite_norm_and_gradient():
    x = torch.zeros(2, 5, requires_grad=True)
    y = RMSNormFunction.apply(x, 1e-6)
    y.sum().backward()
    assert (y == 0).all() and torch.isfinite(x.grad).all()


@pytest.mark.parametrize("back", [False, True])
def test_the_rotation_is_one_graph_for_a_compiler(monkeypatch, back):
    """What a GPU compiles; here the graph runs as traced, with products and sums apart: an ulp of values up to 5."""
    from hrm_megatron.model.functions import _rotate

    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    x = torch.randn(7, 2, 3, 6, generator=torch.Generator().manual_seed(1))
    traced = torch.compile(_rotate, fullgraph=True, backend=backend)(x, COS, SIN, back)
    assert len(graphs) == 1
    assert (traced - _rotate(x, COS, SIN, back)).abs().max() <= 1e-6


def test_a_cpu_compiles_no_rotation(monkeypatch):
    from hrm_megatron.model import functions

    monkeypatch.setattr(functions, "_fused_rotate", None)
    RotateFunction.apply(torch.ones(7, 2, 3, 6, requires_grad=True), COS, SIN).sum().backward()
