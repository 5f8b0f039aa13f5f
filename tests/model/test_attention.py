"""Every attention kernel against the dense definition, and the mask against its words."""
import pytest
import torch

from hrm_megatron.config import Architecture, ConfigError
from hrm_megatron.model.prefix_lm import PrefixSequences
from hrm_megatron.model.rotary import Rotation

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
    from hrm_megatron.model.attention import core_attention
    from hrm_megatron.model.hrm_config import hrm_config

    config = hrm_config(Architecture(1, HEADS * D, HEADS, 16, 250))
    return core_attention(name)(config, layer_number=1, attn_mask_type=None, attention_type="self")


def sequences_of(lengths, row_tokens):
    positions = torch.zeros(len(lengths), row_tokens, dtype=torch.int64)
    for row, pairs in enumerate(lengths):
        where = torch.cat([torch.arange(p + r) for p, r in pairs])
        positions[row, :len(where)] = where
    return PrefixSequences(lengths, Rotation.of(positions, D, 1e4))


@pytest.mark.parametrize("name", ["sdpa", "cpu"])
@pytest.mark.parametrize("packing", PACKINGS)
def test_outputs_and_gradients_equal_the_definition(single_rank, name, packing):
    lengths = PACKINGS[packing]
    row_tokens = ROW_TOKENS if packing != "exactly full" else 23
    generator = torch.Generator().manual_seed(3)
    inputs = [torch.randn(row_tokens, len(lengths), HEADS, D, generator=generator) for _ in range(3)]
    probe = torch.randn(row_tokens, len(lengths), HEADS * D, generator=generator)
    results = {}
    for which in ("dense", name):
        leaves = [t.clone().requires_grad_() for t in inputs]
        out = kernel(which)(*leaves, packed_seq_params=sequences_of(lengths, row_tokens))
        results[which] = [out, *torch.autograd.grad((out * probe).sum(), leaves)]
    for have, want in zip(results[name], results["dense"], strict=True):
        assert (have - want).abs().max() < 2e-6  # one softmax in fp32, summed in another order


@pytest.mark.parametrize("name", ["dense", "sdpa", "cpu"])
def test_padding_gives_zeros(single_rank, name):
    lengths = PACKINGS["padding"]
    q, k, v = (torch.randn(ROW_TOKENS, 2, HEADS, D) for _ in range(3))
    out = kernel(name)(q, k, v, packed_seq_params=sequences_of(lengths, ROW_TOKENS))
    assert (out[19:, 0] == 0).all() and (out[4:, 1] == 0).all()
    assert (out[:19, 0].abs().sum(-1) > 0).all()


def test_the_mask_says_what_prefix_lm_means():
    lengths = [[(2, 3), (1, 0), (3, 1)]]
    allowed = PrefixSequences(lengths, None).dense_mask(0, 12)
    example = [0] * 5 + [1] + [2] * 4
    prefix = [True, True, False, False, False, True, True, True, True, False]
    for query in range(12):
        for key in range(12):
            same = query < 10 and key < 10 and example[query] == example[key]
            want = same and (prefix[key] or (not prefix[query] and key <= query))
            assert allowed[query, key] == want, (query, key)


def test_an_unknown_kernel_is_refused_with_the_choices(single_rank):
    from hrm_megatron.model.attention import core_attention

    with pytest.raises(ConfigError, match="attention_kernel='flash': choose one of auto, dense, sdpa, cpu"):
        core_attention("flash")
