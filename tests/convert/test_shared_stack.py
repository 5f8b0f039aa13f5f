"""Baselines of one stack in transformers, as the HRM that they are, against our own code of each."""
from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from transformers import HrmTextForCausalLM

from hrm_megatron.config import Architecture, ConfigError
from hrm_megatron.convert.checkpoint import RAW
from hrm_megatron.convert.run import Conversion, convert
from hrm_megatron.convert.to_megatron import write_megatron
from hrm_megatron.data.batch import PackedBatch, assemble_row
from hrm_megatron.generate.load import load_model
from hrm_megatron.model_types import MODEL_TYPES
from hrm_megatron.parallel.single import single_rank
from hrm_megatron.quantize.job import Job
from hrm_megatron.quantize.run import quantize

AS_HRM = {"ut": (1, 3), "trm": (2, 1), "trm_match_recurrence": (2, 3)}  # cycles of H and of L


def made(random_checkpoint, model_type, **changes):
    kind = MODEL_TYPES[model_type]
    wide = random_checkpoint(Architecture(2, 24, 3, 40, 256, **dict(
        h_cycles=kind.h_cycles, l_cycles=kind.l_cycles, model_type=model_type) | changes))
    low, high = kind.bp_steps
    return dataclasses.replace(
        wide, read=lambda part, entry: wide.read(part, entry) * wide.architecture.input_std,
        training=dataclasses.replace(wide.training, bp_min_steps=low, bp_max_steps=high))


@pytest.mark.parametrize("model_type", ["ut", *(pytest.param(name, marks=pytest.mark.slow) for name in (
    "trm", "trm_match_recurrence"))])
def test_transformers_computes_the_same(random_checkpoint, tmp_path, parity, model_type):
    checkpoint = made(random_checkpoint, model_type)
    write_megatron(checkpoint, tmp_path / "megatron")
    said = convert(Conversion(tmp_path / "megatron", "megatron", tmp_path / "hf", "hf", weights=RAW))
    assert f"of a {MODEL_TYPES[model_type].title}, as an HRM with its stack twice" in said
    assert float(re.search(r"within (\S+) of their norm", said)[1]) < 1e-5
    theirs = HrmTextForCausalLM.from_pretrained(tmp_path / "hf")
    assert (theirs.config.H_cycles, theirs.config.L_cycles) == AS_HRM[model_type]
    row = assemble_row([(torch.arange(3, 10).numpy(), torch.arange(20, 26).numpy())], 12)
    batch = PackedBatch.from_rows({name: tensor[None] for name, tensor in row.items()})
    with single_rank(), torch.no_grad():
        model = load_model(checkpoint, RAW)
        ours = model.logits_at(model.states(batch), torch.arange(12))
        logits = theirs(batch.tokens, token_type_ids=torch.tensor([[1] * 7 + [0] * 5])).logits[0]
    parity(f"hf, {model_type}: logits", (ours - logits).abs().max().item(), 1e-5)  # as of an HRM


@pytest.mark.slow
def test_a_file_for_llama_cpp_reads_back_as_the_same(random_checkpoint, tmp_path):
    write_megatron(made(random_checkpoint, "trm"), tmp_path / "megatron")
    said = convert(Conversion(tmp_path / "megatron", "megatron", tmp_path / "gguf", "gguf"))
    assert float(re.search(r"within (\S+) of their norm", said)[1]) < 1e-5


@pytest.mark.parametrize("model_type, changes", [
    ("transformer", {}), *(pytest.param(*one, marks=pytest.mark.slow) for one in (
        ("rins", {}), ("ut", dict(l_cycles=1))))])
def test_what_no_hrm_computes_is_refused(random_checkpoint, tmp_path, model_type, changes):
    checkpoint = made(random_checkpoint, model_type, **changes)
    if changes:
        checkpoint = dataclasses.replace(checkpoint, training=dataclasses.replace(
            checkpoint.training, bp_min_steps=1, bp_max_steps=1))
    write_megatron(checkpoint, tmp_path / "megatron")
    with pytest.raises(ConfigError, match=f"a {MODEL_TYPES[model_type].title}, which transformers' HrmText does not"
                                          ".*; save as megatron or native$"):
        convert(Conversion(tmp_path / "megatron", "megatron", tmp_path / "hf", "hf"))
    with pytest.raises(ConfigError, match="does not have .*; quantize an HRM with pre-norm layers$"):
        quantize(Job(tmp_path / "megatron", tmp_path / "small", "int8", method="rtn"))
