"""Linear layers on our own product are the stock ones; which machine gets them."""
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from hrm_megatron.parallel.cpu import activate

activate()

from megatron.core import parallel_state  # noqa: E402
from megatron.core.models.backends import LocalSpecProvider  # noqa: E402
from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce  # noqa: E402

from hrm_megatron.layers import linear as linear_module  # noqa: E402
from hrm_megatron.layers.linear import OwnProductProvider, linear, local_provider, on_own_product  # noqa: E402
from hrm_megatron.model.head import LabelScores  # noqa: E402
from hrm_megatron.parallel.main_grad import GradientsAdded  # noqa: E402
from tests.model.small import Sums  # noqa: E402


@pytest.mark.parametrize("rows, k, n, on_onednn", [((7, 3), 12, 5, False), ((7, 3), 12, 5, True), ((1,), 4, 4, True),
                                                   ((130,), 33, 70, True)])
def test_product_and_gradients_are_those_of_a_linear_layer(monkeypatch, rows, k, n, on_onednn):
    if on_onednn:
        monkeypatch.setattr(linear_module, "MIN_MULTIPLICATIONS", 0)
    generator = torch.Generator().manual_seed(3)
    x, weight = (torch.randn(*shape, k, generator=generator).requires_grad_() for shape in (rows, (n,)))
    wanted_x, wanted_weight = (t.detach().double().requires_grad_() for t in (x, weight))
    out, wanted = linear(x, weight), wanted_x @ wanted_weight.t()
    g = torch.randn(out.shape, generator=generator)
    out.backward(g)
    wanted.backward(g.double())
    for ours, exact in ((out, wanted), (x.grad, wanted_x.grad), (weight.grad, wanted_weight.grad)):
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=2e-5)  # fp32 sums of up to 130 products


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
    stock = on_own_product(linear_with_grad_accumulation_and_async_allreduce)

    def use(x):
        if layer == "ours":
            return linear(x, weight, fusion=True)
        if layer == "compiled":  # itself it answers nothing for the weight
            return GradientsAdded.apply(linear(x, weight.detach()), weight)
        if layer == "head":
            labels = torch.arange(len(x))
            group = SimpleNamespace(rank=lambda: 0, size=lambda: 1)
            scores = LabelScores.apply(x, weight, labels, 2, F.linear, group, weight.main_grad)
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


def test_what_is_no_plain_product_stays_stock():
    calls = []
    impl = on_own_product(lambda **options: calls.append(options) or torch.zeros(()))
    x, weight = torch.ones(2, 3), torch.ones(4, 3)
    plain = dict(input=x, weight=weight, bias=None, allreduce_dgrad=False, sequence_parallel=False, tp_group=None,
                 gradient_accumulation_fusion=False)
    assert torch.equal(impl(**plain), torch.full((2, 4), 3.0)) and not calls
    for other in (dict(bias=torch.zeros(4)), dict(allreduce_dgrad=True), dict(sequence_parallel=True)):
        impl(**plain | other)
        assert calls.pop() == plain | other


@pytest.mark.parametrize("facts, provider", [
    ("vendor_id : AuthenticAMD\n", OwnProductProvider), ("vendor_id : GenuineIntel\n", LocalSpecProvider),
    (None, LocalSpecProvider)])
def test_which_machine_gets_them(monkeypatch, tmp_path, facts, provider):
    if facts:
        (tmp_path / "cpuinfo").write_text(facts)
    monkeypatch.setattr(linear_module, "CPU_FACTS", tmp_path / "cpuinfo")
    assert type(local_provider()) is (LocalSpecProvider if torch.cuda.is_available() else provider)
