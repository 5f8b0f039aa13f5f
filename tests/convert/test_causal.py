"""Models that read prompts causally: the same function in transformers, and files that ask for no prefix."""
from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer

from hrm_megatron.config import Architecture, ConfigError
from hrm_megatron.convert.gguf_file import GGUF_FILE, write_gguf
from hrm_megatron.convert.hf import read_hf, write_hf
from hrm_megatron.convert.run import Conversion, convert
from hrm_megatron.convert.table import table
from hrm_megatron.data.batch import PackedBatch, assemble_row
from hrm_megatron.data.spelling import EOQ
from hrm_megatron.generate.decode import generate
from hrm_megatron.generate.load import load_model, open_checkpoint, opened
from hrm_megatron.parallel.single import single_rank
from tests.convert.test_export import QUESTIONS, tokenizer, without_ends  # noqa: F401


@pytest.fixture(scope="module")
def checkpoint(random_checkpoint, tokenizer):  # noqa: F811
    """Weights as wide as those that training begins with."""
    wide = random_checkpoint(Architecture(2, 24, 3, 40, tokenizer.vocab_size, attention_mask="causal"))
    return dataclasses.replace(wide, read=lambda part, entry: wide.read(part, entry) * wide.architecture.input_std)


@pytest.fixture(scope="module")
def export(checkpoint, tokenizer, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("causal") / "hf"
    write_hf(checkpoint, folder, tokenizer=tokenizer.path)
    return folder


@pytest.fixture(scope="module")
def loaded(export):
    return AutoTokenizer.from_pretrained(export), AutoModelForCausalLM.from_pretrained(export)


def test_transformers_computes_our_logits(checkpoint, loaded, parity):
    prefix, target = torch.arange(3, 10).numpy(), torch.arange(20, 26).numpy()
    found = {}
    for mask in ("causal", "prefix-lm"):
        row = assemble_row([(prefix, target)], 12, causal=mask == "causal")
        batch = PackedBatch.from_rows({name: tensor[None] for name, tensor in row.items()})
        architecture = dataclasses.replace(checkpoint.architecture, attention_mask=mask)
        with single_rank(), torch.no_grad():
            model = load_model(dataclasses.replace(checkpoint, architecture=architecture))
            found[mask] = model.logits_at(model.states(batch), torch.arange(12))
    with torch.no_grad():
        theirs = loaded[1](batch.tokens).logits[0]
    parity("hf, causal: logits", (found["causal"] - theirs).abs().max().item(), 1e-5)  # as of a model with a prefix
    assert (found["prefix-lm"] - theirs).abs().max() > 0.01


def test_a_padded_batch_answers_as_our_model_without_types(checkpoint, tokenizer, loaded):  # noqa: F811
    theirs, model = loaded
    prompts = [tokenizer.encode_prefix("cot", question) for question in QUESTIONS]
    batch = theirs([f"<|im_start|><|object_ref_end|>{question}{EOQ}" for question in QUESTIONS], padding=True,
                   return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    answers = without_ends(model, model.generate(**batch, max_new_tokens=6, do_sample=False), max(map(len, prompts)))
    with single_rank():
        ours = generate(load_model(checkpoint), prompts, tokenizer.eoa, tokenizer.vocab_size, 6)
    assert answers == [[i for i in answer if i != tokenizer.eoa] for answer in ours]


def test_the_files_ask_for_no_prefix(export, checkpoint):
    config = json.loads((export / "config.json").read_text())
    assert config["prefix_lm"] is False and not (export / "custom_generate").exists()
    pair = json.loads((export / "tokenizer.json").read_text())["post_processor"]["pair"]
    assert {part["Sequence"]["type_id"] for part in pair} == {0}
    card = (export / "README.md").read_text()
    assert "reads prompts causally, as it was trained to" in card and "vLLM (0.33) ignores that setting" in card
    assert not re.search("Pass `token_type_ids`|custom_generate", card)
    again = read_hf(export)
    assert again.architecture.causal and all(torch.equal(again.read("raw", entry), checkpoint.part_of("ema", entry).to(
        torch.float32 if entry.trained else torch.bfloat16)) for entry in table(checkpoint.architecture))
    (export.parent / "odd").mkdir()
    (export.parent / "odd" / "config.json").write_text(json.dumps(config | {"prefix_lm": "no"}))
    with pytest.raises(ConfigError, match="prefix_lm: 'no' is neither true nor false"):
        read_hf(export.parent / "odd")


@pytest.mark.slow
def test_every_format_keeps_the_mask(export, tmp_path):
    convert(Conversion(export, "hf", tmp_path / "megatron", "megatron"))
    assert open_checkpoint(tmp_path / "megatron").architecture.causal
    said = convert(Conversion(tmp_path / "megatron", "megatron", tmp_path / "hf", "hf"))
    assert float(re.search(r"within (\S+) of their norm", said)[1]) < 1e-5
    with opened(tmp_path / "hf") as again:
        assert again.architecture.causal


def test_a_file_for_llama_cpp_is_read_as_it_is(checkpoint, tmp_path):
    write_gguf(checkpoint, tmp_path)
    assert GGUFReader(tmp_path / GGUF_FILE).fields["hrm_text.hrm.prefix_lm"].contents() is False
    card = (tmp_path / "README.md").read_text()
    assert "reads a prompt causally, as the model was trained to" in card
    assert not re.search("override|both ways|another function", card)
