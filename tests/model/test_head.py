"""The head with its loss against the plain one: all logits, cross-entropy by its formula, autograd."""
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from tests.rounding import LOSSES, allowed, error

H, V = 12, 70


class OneRank:
    def rank(self):
        return 0

    def size(self):
        return 1


def inputs(n, seed=0, width=V):
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(n, H, generator=generator), torch.randn(width, H, generator=generator)
    labels = torch.randint(width, (n,), generator=generator)
    return x, weight, labels, torch.randn(n, generator=generator)  # each label has an incoming gradient of its own


def chunked(x, weight, labels, g, chunk_rows, main_grad=None):
    """Scores and the gradients of x and weight."""
    from hrm_megatron.model.head import LabelScores

    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    scores = LabelScores.apply(x, weight, labels, chunk_rows, OneRank(), main_grad)
    assert scores.shape == (2, len(x)) and scores.dtype == torch.float32
    (scores[0] * g).sum().backward()
    return scores.detach(), x.grad, weight.grad


def doubled(*tensors):
    return [t.double() if t.is_floating_point() else t for t in tensors]


def plain(x, weight, labels, g, wide=torch.float64):
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    logits = F.linear(x, weight).to(wide)
    losses = logits.logsumexp(-1) - logits.gather(1, labels[:, None])[:, 0]
    (losses * g).sum().backward()
    return torch.stack((losses.detach(), (logits.argmax(-1) == labels).to(wide))), x.grad, weight.grad


@pytest.mark.parametrize("n, chunk_rows", [(30, 30), (30, 99), (30, 10), (30, 7), (30, 1), (1, 4)])
def test_value_and_gradients_are_those_of_the_plain_loss(single_rank, parity, n, chunk_rows):
    x, weight, labels, g = inputs(n)
    labels[::3] = F.linear(x, weight).argmax(-1)[::3]  # some right ones
    wanted = plain(*doubled(x, weight, labels, g))
    # A single label shows too few errors to measure what the formula rounds.
    bound = max(allowed(plain(*some, torch.float32), plain(*doubled(*some)))
                for some in ((x, weight, labels, g), inputs(30)))
    for name, ours, exact in zip(("scores", "dx", "dw"), chunked(x, weight, labels, g, chunk_rows), wanted,
                                 strict=True):
        parity(f"head, {n} labels by {chunk_rows}: {name}", error(ours, exact), bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_rows", [30, 7])
def test_losses_and_gradients_of_logits_are_bitwise_those_of_megatron(single_rank, dtype, chunk_rows):
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    x, weight, labels, g = (t.to(dtype) if t.is_floating_point() else t for t in inputs(30))
    # One product for each gradient: dx is then the gradient of logits itself.
    weight, x = torch.eye(V, dtype=dtype), F.linear(x, weight)
    logits = x.clone().requires_grad_()
    losses = vocab_parallel_cross_entropy(logits.float(), labels)  # in place
    (losses * g.float()).sum().backward()
    scores, dx, _ = chunked(x, weight, labels, g.float(), chunk_rows)
    assert torch.equal(scores[0], losses) and torch.equal(dx, logits.grad)


def test_without_a_label_there_is_a_zero_gradient(single_rank):
    scores, dx, dw = chunked(*inputs(0), chunk_rows=4)
    assert scores.shape == (2, 0) and dx.shape == (0, H) and torch.equal(dw, torch.zeros(V, H))


@pytest.mark.parametrize("chunk_rows", [30, 7])
def test_bf16_rounds_as_the_plain_loss_does(single_rank, parity, chunk_rows):
    x, weight, labels, g = (t.bfloat16() if t.is_floating_point() else t for t in inputs(30))
    g = g.float()
    wanted = plain(x, weight, labels, g, torch.float32)
    ours = chunked(x, weight, labels, g, chunk_rows)
    assert [t.dtype for t in ours] == [torch.float32, torch.bfloat16, torch.bfloat16]
    # The loss is in fp32 on the same rounded logits; gradients of these are rounded to bf16 (2^-9) in both, and once
    # more in the end.
    for name, have, want, tolerance in zip(("scores", "dx", "dw"), ours, wanted, (1e-6, 2**-8, 2**-8), strict=True):
        parity(f"head in bf16, by {chunk_rows}: {name}",
               ((have.float() - want.float()).abs().max() / want.abs().max()).item(), tolerance)


def test_a_sure_label_keeps_its_small_gradient_in_bf16(single_rank):
    # softmax = 1 - 3e-4 is 1 in bf16; what matters is the difference, known to 2^-9.
    weight = torch.zeros(V, H, dtype=torch.bfloat16)
    weight[3, 0] = 1.0
    x = torch.zeros(1, H, dtype=torch.bfloat16)
    x[0, 0] = 12.375
    _, dx, _ = chunked(x, weight, torch.tensor([3]), torch.ones(1), 1)
    exact = -(V - 1) / (V - 1 + torch.tensor(12.375).double().exp())
    assert dx[0, 0].item() == pytest.approx(exact.item(), rel=2**-7) and dx[0, 0] != 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weight_gradient_goes_to_its_fp32_buffer(single_rank, dtype):
    x, weight, labels, g = (t.to(dtype) if t.is_floating_point() else t for t in inputs(30))
    buffer = torch.full((V, H), 0.5)
    wanted = chunked(x.float(), weight.float(), labels, g.float(), 30)[2]
    _, _, returned = chunked(x, weight, labels, g.float(), 7, main_grad=buffer)
    assert returned.shape == weight.shape and not returned.any()  # DDP demands that its hook finds one
    scale = wanted.abs().max()
    # bf16: 30 gradients of logits, each rounded (2^-9), and logits near 10 rounded (2^-6).
    assert (buffer - 0.5 - wanted).abs().max() < (1e-6 if dtype == torch.float32 else 2**-5) * scale


def test_of_equal_logits_the_first_token_is_the_likeliest(single_rank):
    weight = torch.zeros(V, H)
    weight[[5, 60]] = 1.0
    scores, _, _ = chunked(torch.ones(3, H), weight, torch.tensor([5, 60, 6]), torch.ones(3), 2)
    assert scores[1].tolist() == [1, 0, 0]


class Largest(TorchDispatchMode):
    """Counts the elements of the largest tensor that comes out of any operation."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_tensor_has_all_logits(single_rank):
    n, width, chunk_rows = 96, 1000, 8
    with Largest() as ours:
        chunked(*inputs(n, width=width), chunk_rows)
    with Largest() as theirs:
        plain(*inputs(n, width=width), torch.float32)
    assert theirs.elements == n * width
    assert ours.elements == width * H > chunk_rows * width  # the weight itself


def test_the_model_scores_in_chunks_of_so_many_bytes(single_rank, monkeypatch):
    from hrm_megatron.config import Architecture
    from hrm_megatron.data.batch import PackedBatch, assemble_row
    from hrm_megatron.model import head
    from hrm_megatron.model.hrm import HRMModel
    from hrm_megatron.transformer_config import hrm_config

    row = assemble_row([(range(1, 9), range(7))], 17)
    batch = PackedBatch.from_rows({name: tensor[None] for name, tensor in row.items()})
    scores = []
    for chunk_bytes, rows in ((head.HEAD_CHUNK_BYTES, 1 << 19), (4 * 256 * 3 + 5, 3), (5, 1)):
        monkeypatch.setattr(head, "HEAD_CHUNK_BYTES", chunk_bytes)
        model = HRMModel(hrm_config(Architecture(1, H, 2, 16, 250)), seed=3)
        assert model.output_layer.chunk_rows == rows
        scores.append(model(batch=batch).detach())
    assert scores[0].shape == (2, 7)
    for other in scores[1:]:
        torch.testing.assert_close(other, scores[0], rtol=0, atol=LOSSES)


def on_two_ranks():
    """Check a vocabulary in two shards against one in a piece; run by `launch` on each rank."""
    import sys

    import torch
    import torch.nn.functional as F

    from hrm_megatron.model.head import LabelScores

    torch.distributed.init_process_group("gloo")
    group = torch.distributed.group.WORLD
    rank, h, width = group.rank(), 12, 70
    alone = torch.distributed.new_group([0]) if rank == 0 else torch.distributed.new_group([0]) and None
    for n, chunk_rows in ((30, 7), (30, 30), (0, 7)):
        generator = torch.Generator().manual_seed(1)
        x, weight = (torch.randint(-16, 17, (rows, h), generator=generator) / 8 for rows in (n, width))
        g, labels = torch.randn(n, generator=generator), torch.randint(width, (n,), generator=generator)
        # Logits are sums of few bits, the same in every order.
        weight[50] = weight[20]  # equals in different shards
        labels[:20] = F.linear(x, weight).argmax(-1)[:20]
        labels[::2] = torch.where(labels[::2] == 20, 50, labels[::2])
        results = []
        for shard, of in ((weight.chunk(2)[rank], group), (weight, alone)):
            if of is None:
                continue
            leaf, shard = x.clone().requires_grad_(), shard.clone().requires_grad_()
            scores = LabelScores.apply(leaf, shard, labels, chunk_rows, of, None)
            (scores[0] * g).sum().backward()
            results.append((scores.detach(), leaf.grad, shard.grad))
        gathered = [torch.empty_like(results[0][2]) for _ in range(2)]
        torch.distributed.all_gather(gathered, results[0][2])
        if rank == 0:
            sharded, whole = (*results[0][:2], torch.cat(gathered)), results[1]
            assert torch.equal(sharded[0][1], whole[0][1])
            for have, want in zip(sharded, whole, strict=True):
                # Two orders of sums of at most `width` terms, each rounded by 2^-24.
                bound = 2 * width * 2 ** -24 * want.abs().amax() if n else 0
                assert have.shape == want.shape and ((have - want).abs() <= bound).all()
            print("difference", n, [(a - b).abs().max().item() for a, b in zip(sharded, whole, strict=True) if n])
    torch.distributed.destroy_process_group()
    sys.exit(0)


@pytest.mark.ranks
def test_two_shards_of_the_vocabulary_equal_one(launch):
    run = launch(ranks=2, prelude=f"{inspect.getsource(on_two_ranks)}\non_two_ranks()")
    assert run.code == 0, run.output
    assert run.output.count("difference") == 3
