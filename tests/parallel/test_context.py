"""Slices of context ranks: what each holds, and the whole row from all of them without a word from the host."""
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hrm_megatron.parallel.context import GatherRows, context_positions


@pytest.fixture
def ranks(monkeypatch):
    """Play the collectives of ranks in one process: `.slices` is gathered, `.summed` gets what is reduced."""
    played = SimpleNamespace(slices=None, summed=None)

    def gather(out, mine, group):
        out.copy_(torch.cat(played.slices) if played.slices else out)

    def reduce(out, whole, group):
        assert whole.is_contiguous()
        played.summed = whole
        out.copy_(whole[:len(out)])
    monkeypatch.setattr(torch.distributed, "all_gather_into_tensor", gather)
    monkeypatch.setattr(torch.distributed, "reduce_scatter_tensor", reduce)
    return played


@pytest.mark.parametrize("size", [2, 3])
def test_rows_are_put_together_in_their_order_and_gradients_cut_again(ranks, size):
    row_tokens, h = 4 * 2 * size, 5
    row = torch.randn(row_tokens, h)
    positions = [context_positions(row_tokens, rank, size) for rank in range(size)]
    ranks.slices = [row[mine] for mine in positions]
    x = ranks.slices[0].clone().requires_grad_()
    whole = GatherRows.apply(x, SimpleNamespace(size=lambda: size))
    assert torch.equal(whole, row)
    g = torch.randn(row_tokens, h)
    whole.backward(g)
    assert torch.equal(ranks.summed, torch.cat([g[mine] for mine in positions]))
    assert torch.equal(x.grad, g[positions[0]])


class NothingOfTheHost(TorchDispatchMode):
    """Lets no tensor of the host into an operation: a copy of it to a GPU would make the host wait."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            assert not isinstance(tensor, torch.Tensor) or tensor.is_meta, function
        return out


def test_the_host_hands_nothing_over(ranks):
    x = torch.empty(8, 5, device="meta", requires_grad=True)
    g = torch.empty(16, 5, device="meta")
    with NothingOfTheHost():
        GatherRows.apply(x, SimpleNamespace(size=lambda: 2)).backward(g)
    assert x.grad.shape == x.shape
