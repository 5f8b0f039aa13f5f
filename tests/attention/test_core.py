"""Every attention kernel against the dense definition, and the mask against its words."""
import pytest
import torch

from hrm_megatron.attention.prefix_lm import PrefixSequences, context_loads
from hrm_megatron.attention.rotary import Rotation
from hrm_megatron.config import Architecture
from hrm_megatron.parallel.context import context_positions, context_spans
from tests.attention.plain_attention import attend
from tests.rounding import allowed, error

HEADS, D = 3, 8
PACKINGS = {
    "padding": [[(3, 4), (5, 0), (1, 6)], [(2, 2)]],
    "alone": [[(7, 5)]],
    "no responses": [[(1, 0), (4, 0), (2, 0)]],
    "one-token prefixes": [[(1, 1), (1, 9), (1, 0)]],
    "exactly full": [[(6, 8), (4, 5)]],
}
ROW_TOKENS = 23


def kernel(name):
    from hrm_megatron.attention.core import KERNELS, VarlenAttention
    from hrm_megatron.attention.varlen import plain_varlen
    from hrm_megatron.transformer_config import hrm_config

    config = hrm_config(Architecture(1, HEADS * D, HEADS, 16, 250))
    classes = KERNELS | {"two calls": VarlenAttention}
    attention = classes[name](config, layer_number=1, attn_mask_type=None, attention_type="self")
    if name == "two calls":
        attention.primitive = plain_varlen
    return attention


def sequences_of(lengths, row_tokens):
    positions = torch.zeros(len(lengths), row_tokens, dtype=torch.int64)
    for row, pairs in enumerate(lengths):
        where = torch.cat([torch.arange(p + r) for p, r in pairs])
        positions[row, :len(where)] = where
    return PrefixSequences(lengths, Rotation.of(positions, D, 1e4), row_tokens)


@pytest.mark.parametrize("name", ["sdpa", "cpu", "two calls"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_outputs_and_gradients_equal_the_definition(single_rank, name, packing):
    lengths = PACKINGS[packing]
    row_tokens = ROW_TOKENS if packing != "exactly full" else 23
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.randn(row_tokens, len(lengths), HEADS, D, generator=generator) for _ in range(3)]
    probe = torch.randn(row_tokens, len(lengths), HEADS * D, generator=generator)
    results, sequences = [], sequences_of(lengths, row_tokens)
    for attention in (kernel(name).attend, attend, kernel("dense").attend):  # the last in fp64
        leaves = [t.clone().requires_grad_() for t in inputs]
        out = attention(*rotated(leaves, sequences, torch.arange(row_tokens)), sequences)
        results.append([out, *torch.autograd.grad((out * probe).sum(), leaves)])
    for have, want in zip(results[0], results[2], strict=True):
        assert error(have, want) <= allowed(*results[1:])


@pytest.mark.parametrize("name", ["dense", "sdpa", "cpu", "two calls"])
@pytest.mark.parametrize("size", [2, 3])
def test_the_slices_of_context_ranks_are_those_of_the_whole(single_rank, name, size):
    """Each rank with its queries and all keys: outputs and query gradients are slices, key gradients add up."""
    lengths, row_tokens = PACKINGS["padding"], 24
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(row_tokens, len(lengths), HEADS, D, generator=generator) for _ in range(3))
    probe = torch.randn(row_tokens, len(lengths), HEADS * D, generator=generator)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    whole = kernel("dense")(*leaves, packed_seq_params=sequences_of(lengths, row_tokens))
    want = torch.autograd.grad((whole * probe).sum(), leaves)
    layer, totals, seen = kernel(name), [torch.zeros_like(k), torch.zeros_like(v)], []
    for rank in range(size):
        positions = context_positions(row_tokens, rank, size)
        seen += positions.tolist()
        leaves = [q[positions].clone().requires_grad_(), k.clone().requires_grad_(), v.clone().requires_grad_()]
        sequences = sequences_of(lengths, row_tokens)
        sequences.spans = context_spans(row_tokens, rank, size)
        out = layer.attend(*rotated(leaves, sequences, positions), sequences)
        assert (out - whole[positions]).abs().max() < 2e-6
        dq, dk, dv = torch.autograd.grad((out * probe[positions]).sum(), leaves)
        assert (dq - want[0][positions]).abs().max() < 2e-6
        for total, part in zip(totals, (dk, dv), strict=True):
            total += part
    assert sorted(seen) == list(range(row_tokens))
    for total, wanted in zip(totals, want[1:], strict=True):
        assert (total - wanted).abs().max() < 4e-6  # a sum over the ranks


@pytest.mark.parametrize("name", ["dense", "sdpa", "cpu", "two calls"])
def test_a_context_rank_of_padding_alone_takes_part_in_the_backward(single_rank, name):
    """The backward of gathered keys is a collective: a rank without it would make the others wait for ever."""
    sequences = PrefixSequences([[(2, 1)], []], None, 16, context_spans(16, 1, 2))  # holds 4 to 12
    q, k, v = (torch.randn(n, 2, HEADS, D, requires_grad=True) for n in (8, 16, 16))
    out = kernel(name).attend(q, k, v, sequences)
    assert out.shape == (8, 2, HEADS * D) and (out == 0).all()
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
        assert (gradient == 0).all()


def rotated(leaves, sequences, positions):
    """Rotate the queries of a rank, and all keys, as the layers of all ranks would together."""
    q, k, v = leaves
    cos, sin = sequences.rotation.cos, sequences.rotation.sin
    return Rotation(cos[positions], sin[positions])(q)[0], sequences.rotation(k)[0], v


@pytest.mark.parametrize("name", ["dense", "sdpa", "cpu", "two calls"])
def test_padding_gives_zeros(single_rank, name):
    lengths = PACKINGS["padding"]
    q, k, v = (torch.randn(ROW_TOKENS, 2, HEADS, D) for _ in range(3))
    out = kernel(name)(q, k, v, packed_seq_params=sequences_of(lengths, ROW_TOKENS))
    assert (out[19:, 0] == 0).all() and (out[4:, 1] == 0).all()
    assert (out[:19, 0].abs().sum(-1) > 0).all()


def test_the_mask_says_what_prefix_lm_means():
    lengths = [[(2, 3), (1, 0), (3, 1)]]
    allowed = PrefixSequences(lengths, None, 12).dense_mask(0)
    example = [0] * 5 + [1] + [2] * 4
    prefix = [True, True, False, False, False, True, True, True, True, False]
    for query in range(12):
        for key in range(12):
            same = query < 10 and key < 10 and example[query] == example[key]
            want = same and (prefix[key] or (not prefix[query] and key <= query))
            assert allowed[query, key] == want, (query, key)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_pairs_of_context_ranks_are_those_of_the_mask(size):
    lengths = [[(5, 6), (1, 0), (9, 1)], [(2, 11)], []]
    row_tokens = 24
    masks = [PrefixSequences(lengths, None, row_tokens).dense_mask(row) for row in range(3)]
    positions = [context_positions(row_tokens, rank, size) for rank in range(size)]
    counted = [sum(int(mask[mine].sum()) for mask in masks) for mine in positions]
    assert context_loads(lengths, row_tokens, size) == counted
