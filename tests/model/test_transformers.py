"""The model against transformers' HrmText, an implementation by other hands, on random unequal sizes."""
import pytest
import torch
from transformers import HrmTextConfig, HrmTextForCausalLM

from hrm_megatron.attention.prefix_lm import PrefixSequences
from hrm_megatron.attention.rotary import Rotation
from hrm_megatron.config import Architecture
from hrm_megatron.convert.table import table
from hrm_megatron.data.batch import PackedBatch, assemble_row

TOLERANCE = 2e-5  # fp32, two orders of operations over at most 12 applications of 3 layers
SIZES = [  # layers per stack, hidden, heads, ffn, H cycles, L cycles
    (1, 24, 3, 40, 2, 3), (3, 32, 2, 72, 1, 2), (2, 40, 5, 24, 3, 1), (2, 48, 4, 56, 2, 2), (1, 16, 1, 96, 3, 3),
]


def models(sizes, seed):
    from hrm_megatron.model.hrm import HRMModel
    from hrm_megatron.transformer_config import hrm_config

    layers, hidden, heads, ffn, h_cycles, l_cycles = sizes
    architecture = Architecture(layers, hidden, heads, ffn, 250, h_cycles, l_cycles)
    ours = HRMModel(hrm_config(architecture), seed=seed).eval()
    theirs = HrmTextForCausalLM(HrmTextConfig(
        vocab_size=256, hidden_size=hidden, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
        head_dim=hidden // heads, H_cycles=h_cycles, L_cycles=l_cycles, initializer_range=architecture.input_std,
        pad_token_id=0)).eval()
    values = {**dict(ours.named_parameters()), **dict(ours.named_buffers())}
    missing, left_over = theirs.load_state_dict(split_fused(architecture, values), strict=False)
    assert not left_over and not [name for name in missing if "inv_freq" not in name]
    return ours, theirs


def split_fused(architecture, values):
    """State dict of an HrmTextForCausalLM object, whose modules hold the fused tensors' parts."""
    state = {}
    for entry in table(architecture):
        tensor = entry.from_megatron(values[entry.megatron].detach()).float()
        if "gqkv_proj" in entry.hf:
            for name, part in zip(("gate", "q", "k", "v"), tensor.chunk(4), strict=True):
                state[entry.hf.replace("attn.gqkv_proj", f"self_attn.{name}_proj")] = part
        elif "gate_up_proj" in entry.hf:
            for name, part in zip(("gate", "up"), tensor.chunk(2), strict=True):
                state[entry.hf.replace("gate_up_proj", f"{name}_proj")] = part
        else:
            state[entry.hf.replace("attn.o_proj", "self_attn.o_proj")] = tensor
    return state


def random_examples(generator, pairs):
    def ids(n):
        return torch.randint(1, 250, (n,), generator=generator).numpy()
    return [(ids(p), ids(r + 1)) for p, r in pairs]


@pytest.mark.parametrize(("case", "sizes"), enumerate(SIZES))
def test_packed_rows_equal_transformers_with_the_rows_mask(single_rank, case, sizes):
    ours, theirs = models(sizes, seed=case)
    examples = random_examples(torch.Generator().manual_seed(case), [(5, 3), (1, 0), (4, 7), (6, 1)])
    row = {name: tensor[None] for name, tensor in assemble_row(examples, 31).items()}  # 4 positions of padding
    batch = PackedBatch.from_rows(row)
    sequences = PrefixSequences(batch.lengths, Rotation.of(batch.position_ids, 2, 1e4), 31)
    allowed = sequences.dense_mask(0)
    allowed[27:] = torch.eye(31, dtype=torch.bool)[27:]  # padding must see something there; it is not compared
    mask = torch.zeros(1, 1, 31, 31).masked_fill(~allowed, float("-inf"))
    with torch.no_grad():
        want = theirs(input_ids=batch.tokens, attention_mask=mask, position_ids=batch.position_ids).logits[0]
        z_h = ours.states(batch)
        have = ours.logits_at(z_h, torch.arange(31))
    assert (have - want)[:27].abs().max() < TOLERANCE


@pytest.mark.parametrize(("case", "sizes"), enumerate(SIZES))
def test_one_example_per_row_equals_transformers_padded_batch(single_rank, case, sizes):
    ours, theirs = models(sizes, seed=10 + case)
    pairs = [(5, 4), (2, 0), (3, 6)]
    examples = random_examples(torch.Generator().manual_seed(case), pairs)
    rows = [assemble_row([example], 9) for example in examples]
    stacked = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    batch = PackedBatch.from_rows(stacked)
    live = torch.tensor([[i < p + r for i in range(9)] for p, r in pairs])
    prefix = torch.tensor([[i < p for i in range(9)] for p, _ in pairs])
    with torch.no_grad():
        want = theirs(input_ids=batch.tokens, attention_mask=live.long(), token_type_ids=prefix.long()).logits
        z_h = ours.states(batch)
        have = ours.logits_at(z_h, torch.arange(27)).view(9, 3, -1).transpose(0, 1)
    assert (have - want)[live].abs().max() < TOLERANCE
