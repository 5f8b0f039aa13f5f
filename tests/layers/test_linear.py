"""Linear layers on our own matmul are the stock ones, less what these do in vain; which machine multiplies how."""
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from hrm_megatron.parallel.cpu import activate

activate()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce  # noqa: E402

from hrm_megatron.layers.linear import (  # noqa: E402
    OwnColumnParallelLinear,
    OwnRowParallelLinear,
    linear,
    on_own_matmul,
)
from hrm_megatron.model.head import LabelScores  # noqa: E402
from hrm_megatron.parallel import processor  # noqa: E402
from hrm_megatron.parallel.main_grad import GradientsAdded  # noqa: E402
from tests.model.small import Sums  # noqa: E402
from tests.rounding import of_sums  # noqa: E402


@pytest.mark.parametrize("rows, k, n, on_onednn", [((7, 3), 12, 5, False), ((7, 3), 12, 5, True), ((1,), 4, 4, True),
                                                   ((130,), 33, 70, True)])
def test_matmul_and_gradients_are_those_of_a_linear_layer(monkeypatch, rows, k, n, on_onednn):
    monkeypatch.setattr(processor, "ON_ONEDNN", on_onednn)
    monkeypatch.setattr(processor, "MIN_MULTIPLICATIONS", 0)
    generator = torch.Generator().manual_seed(3)
    x, weight = (torch.randn(*shape, k, generator=generator).requires_grad_() for shape in (rows, (n,)))
    wanted_x, wanted_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    out, wanted = linear(x, weight), wanted_x @ wanted_weight.t()
    g = torch.randn(out.shape, generator=generator)
    out.backward(g)
    wanted.backward(g.double())
    a, b, c = (t.detach().abs().flatten(0, -2) for t in (x, weight, g))
    for ours, exact, terms, magnitudes in ((out, wanted, k, a @ b.t()), (x.grad, wanted_x.grad, n, c @ b),
                                           (weight.grad, wanted_weight.grad, len(a), c.t() @ a)):
        assert ((ours - exact).abs().flatten(0, -2) <= of_sums(terms, magnitudes)).all()


def test_a_fused_gradient_is_added_to_the_buffer():
    x, weight = torch.ones(2, 3), torch.ones(4, 3, requires_grad=True)
    weight.main_grad, weight.grad_added_to_main_grad = torch.full((4, 3), 0.5), False
    for _ in range(2):
        linear(x, weight, fusion=True).sum().backward()
    assert torch.equal(weight.main_grad, torch.full((4, 3), 4.5)) and weight.grad_added_to_main_grad
    assert weight.grad is not None  # Megatron's DDP demands that its hook finds one


@pytest.mark.parametrize("layer", ["ours", "stock", "compiled", "head"])
def test_gradients_in_the_buffer_are_not_added_up_by_autograd(single_rank, layer):
    """Five uses of a weight in bf16, as of five ticks; and again."""
    n = 6
    x, weight = torch.randn(3, n, dtype=torch.bfloat16), torch.randn(n, n, dtype=torch.bfloat16, requires_grad=True)
    weight.main_grad, weight.grad_added_to_main_grad, arrived = torch.zeros(n, n), False, []
    node = weight.expand_as(weight).grad_fn.next_functions[0][0]  # as Megatron's DDP hooks into it

    def hook(*_):
        arrived.append((weight.grad is not None, weight.grad_added_to_main_grad))
        weight.grad = None
    node.register_hook(hook)
    stock = on_own_matmul(linear_with_grad_accumulation_and_async_allreduce)

    def use(x):
        if layer == "ours":
            return linear(x, weight, fusion=True)
        if layer == "compiled":  # itself it answers nothing for the weight
            return GradientsAdded.apply(linear(x, weight.detach()), weight)
        if layer == "head":
            labels = torch.arange(len(x))
            group = SimpleNamespace(rank=lambda: 0, size=lambda: 1)
            scores = LabelScores.apply(x, weight, labels, 2, group, weight.main_grad)
            return x + scores[0].unsqueeze(1).bfloat16()
        return stock(input=x, weight=weight, bias=torch.zeros(n, dtype=torch.bfloat16), allreduce_dgrad=False,
                     sequence_parallel=False, gradient_accumulation_fusion=True,
                     tp_group=parallel_state.get_tensor_model_parallel_group())
    for _ in range(2):
        out = x
        for _ in range(5):
            out = use(out)
        with Sums([weight.shape], weight.dtype) as sums:
            out.sum().backward()
        assert not sums.found and weight.grad is None
    assert arrived == [(True, True)] * 2  # once in each backward


def test_a_sum_of_gradients_would_be_seen():
    weight = torch.ones(4, 4, requires_grad=True)
    out = weight @ (weight @ weight)
    with Sums([weight.shape], weight.dtype) as sums:
        out.sum().backward()
    assert sums.found == {(4, 4): 2}


OTHER_RANKS = dict(allreduce_dgrad=True), dict(sequence_parallel=True)


def test_what_is_no_plain_matmul_stays_stock():
    calls = []
    impl = on_own_matmul(lambda **options: calls.append(options) or torch.zeros(()))
    x, weight = torch.ones(2, 3, requires_grad=True), torch.ones(4, 3)
    plain = dict(input=x, weight=weight, bias=None, allreduce_dgrad=False, sequence_parallel=False, tp_group=None,
                 gradient_accumulation_fusion=False)
    assert torch.equal(impl(**plain), torch.full((2, 4), 3.0)) and not calls
    for other in (dict(bias=torch.zeros(4)), *OTHER_RANKS):
        impl(**plain | other)
        assert calls.pop() == plain | other
    for other in OTHER_RANKS:
        with torch.no_grad():
            impl(**plain | other | dict(input=x.detach()))
        assert calls.pop()["weight"] is weight


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("layout", [{}, *OTHER_RANKS], ids=["one rank", "tensor parallel", "sequence parallel"])
def test_no_gradient_is_made_that_is_not_needed(single_rank, monkeypatch, layout, wanted):
    from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce as stock

    monkeypatch.setattr(processor, "ON_ONEDNN", False)  # whose matmuls torch does not count
    generator = torch.Generator().manual_seed(5)
    x, weight, g = (torch.randn(*shape, generator=generator) for shape in ((7, 2, 12), (5, 12), (7, 2, 5)))
    options = dict(bias=None, allreduce_dgrad=False, sequence_parallel=False, tp_group=torch.distributed.group.WORLD,
                   gradient_accumulation_fusion=False) | layout
    results = []
    for impl in (on_own_matmul(stock), stock):
        leaf, parameter = x.clone().requires_grad_(wanted), weight.clone().requires_grad_()
        with FlopCounterMode(display=False) as counter:
            out = impl(input=leaf, weight=parameter, **options)
            out.backward(g)
        results.append((counter.get_total_flops(), out, leaf.grad, parameter.grad))
    (flops, *ours), (_, *theirs) = results
    assert flops == (2 + wanted) * 2 * (7 * 2 * 12 * 5)
    for have, want in zip(ours, theirs, strict=True):
        assert have is want is None or torch.equal(have, want)


def test_every_local_linear_layer_is_ours(single_rank):
    from hrm_megatron.config import Architecture
    from hrm_megatron.model.hrm import HRMModel
    from hrm_megatron.transformer_config import hrm_config

    layers = [module for name, module in HRMModel(hrm_config(Architecture(1, 24, 2, 40, 250)), 1).named_modules()
              if name.rpartition(".")[2].startswith("linear_")]
    assert {type(layer) for layer in layers} == {OwnColumnParallelLinear, OwnRowParallelLinear} and len(layers) == 8
