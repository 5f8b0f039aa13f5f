"""A model without attention's gate in formats whose models all have one: as one of 1/2, by transformers' own code."""
from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from transformers import HrmTextForCausalLM

from hrm_megatron.config import Architecture, ConfigError
from hrm_megatron.convert.gguf_file import read_back, write_gguf
from hrm_megatron.convert.hf import read_hf, write_hf
from hrm_megatron.convert.native import read_native, write_native
from hrm_megatron.convert.run import Conversion, convert
from hrm_megatron.convert.table import table
from hrm_megatron.convert.to_megatron import write_megatron
from hrm_megatron.data.batch import PackedBatch, assemble_row
from hrm_megatron.generate.decode import generate
from hrm_megatron.generate.load import load_model, open_checkpoint
from hrm_megatron.parallel.single import single_rank
from hrm_megatron.quantize.job import Job
from hrm_megatron.quantize.run import quantize

UNGATED = Architecture(2, 24, 3, 256, 256, attention_gate="none")


@pytest.fixture(scope="module")
def checkpoint(random_checkpoint):
    return random_checkpoint(UNGATED)


def test_transformers_and_generation_compute_the_same(random_checkpoint, tmp_path, parity):
    wide = random_checkpoint(dataclasses.replace(UNGATED, ffn_hidden_size=40))
    narrow = dataclasses.replace(wide, read=lambda part, entry: wide.read(part, entry) * wide.architecture.input_std)
    write_hf(narrow, tmp_path)
    theirs = HrmTextForCausalLM.from_pretrained(tmp_path)
    for stack in (theirs.model.L_module, theirs.model.H_module):
        assert not any(layer.self_attn.gate_proj.weight.any() for layer in stack.layers)
    prefix, target = torch.arange(3, 10), torch.arange(20, 26)
    row = assemble_row([(prefix.numpy(), target.numpy())], 12)
    batch = PackedBatch.from_rows({name: tensor[None] for name, tensor in row.items()})
    with single_rank(), torch.no_grad():
        model = load_model(narrow)
        ours = model.logits_at(model.states(batch), torch.arange(12))
        answer = generate(model, [prefix.tolist()], None, 256, 5)[0]
        logits = theirs(batch.tokens, token_type_ids=torch.tensor([[1] * 7 + [0] * 5])).logits[0]
        output = theirs.generate(prefix[None], token_type_ids=torch.ones(1, 7, dtype=torch.long), max_new_tokens=5,
                                 attention_mask=torch.ones(1, 7, dtype=torch.long), do_sample=False, eos_token_id=None)
    parity("hf, no gate: logits", (ours - logits).abs().max().item(), 1e-5)  # as of a model with one
    assert output[0, 7:].tolist() == answer


@pytest.mark.parametrize("form", ["native", "hf"])
def test_other_formats_give_back_the_function(checkpoint, tmp_path, form):
    weights = checkpoint.only_weights("ema")
    if form == "native":
        write_native(weights, tmp_path)
        again = read_native(tmp_path)
    else:
        write_hf(weights, tmp_path, "raw")
        again = read_hf(tmp_path)
    assert again.architecture.gated
    as_gated = {entry.megatron: entry for entry in table(again.architecture)}
    for entry in table(UNGATED):
        foreign = as_gated[entry.megatron].from_megatron(again.read("raw", as_gated[entry.megatron]))
        assert torch.equal(entry.to_megatron(foreign), weights.read("raw", entry)), entry.megatron
        if "linear_qkv" in entry.megatron:
            assert not foreign[:24].any() and foreign[24:].any()


@pytest.mark.slow
def test_what_would_go_on_with_a_gate_is_refused(checkpoint, tmp_path):
    with pytest.raises(ConfigError, match="trained with --attention-gate none, and HRM-Text would go on with a gate; "):
        write_native(checkpoint, tmp_path / "native")
    write_megatron(checkpoint, tmp_path / "megatron")
    assert open_checkpoint(tmp_path / "megatron").architecture == UNGATED
    said = convert(Conversion(tmp_path / "megatron", "megatron", tmp_path / "weights", "native", weights="ema"))
    assert "as those of a gate of 1/2 with twice the output projections" in said
    assert float(re.search(r"within (\S+) of their norm", said)[1]) < 1e-5
    with pytest.raises(ConfigError, match="trained without a gate .*--save-format hf first"):
        quantize(Job(tmp_path / "megatron", tmp_path / "small", "int8", method="rtn"))


def test_a_file_for_llama_cpp_reads_back_as_it_was(checkpoint, tmp_path):
    write_gguf(checkpoint, tmp_path)
    again = read_back(tmp_path, checkpoint)
    assert all(torch.equal(again.read("raw", entry), checkpoint.part_of("ema", entry).to(
        torch.float32 if entry.trained else torch.bfloat16)) for entry in table(UNGATED))
