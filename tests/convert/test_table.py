from __future__ import annotations

import pytest
import torch

from hrm_megatron.config import Architecture, ConfigError
from hrm_megatron.convert.table import GatedQKV, check, table

ARCHITECTURE = Architecture(num_layers=3, hidden_size=12, num_attention_heads=2, ffn_hidden_size=20, vocab_size=250)


def test_every_name_is_unique_on_every_side():
    entries = table(ARCHITECTURE)
    assert len(entries) == 1 + 2 * 3 * 4 + 2
    for side in ("megatron", "native", "hf"):
        assert len({entry.name(side) for entry in entries}) == len(entries)


def test_the_round_trip_of_every_tensor_is_bitwise():
    for entry in table(ARCHITECTURE):
        there = torch.randn(entry.shape)
        assert torch.equal(entry.from_megatron(entry.to_megatron(there)), there)
        assert torch.equal(entry.to_megatron(entry.from_megatron(there)), there)


def test_gated_projection_goes_from_blocks_to_heads():
    heads, head_dim, hidden = 2, 3, 5
    # Row 100*block + 10*head + i, with blocks gate 0, query 1, key 2, value 3.
    rows = torch.tensor([100 * block + 10 * head + i for block in range(4) for head in range(heads)
                         for i in range(head_dim)])
    entry = GatedQKV("m", "n", "h", (4 * heads * head_dim, hidden), heads=heads)
    per_head = entry.to_megatron(rows[:, None].expand(-1, hidden))[:, 0]
    assert per_head.tolist() == [100 * block + 10 * head + i for head in range(heads) for block in (1, 0, 2, 3)
                                 for i in range(head_dim)]


@pytest.mark.parametrize("change, message", [
    (lambda found: found.pop("lm_head.weight"), r"ckpt: tensors missing: lm_head\.weight; "),
    (lambda found: found.update({"lm_head.bias": (256,)}), r"ckpt: tensors left over: lm_head\.bias; "),
    (lambda found: found.update({"model.z_L_init": (13,)}), r"ckpt: model\.z_L_init has shape \[13\].* ask for \[12\]"),
    (lambda found: [found.pop(name) for name in list(found) if ".layers.2." in name], "missing: .* and 5 more; "),
])
def test_tensors_that_do_not_fit_are_named(change, message):
    entries = table(ARCHITECTURE)
    found = {entry.hf: entry.shape for entry in entries}
    check("ckpt", "hf", entries, found)
    change(found)
    with pytest.raises(ConfigError, match=message):
        check("ckpt", "hf", entries, found)
