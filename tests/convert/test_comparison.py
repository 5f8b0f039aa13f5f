"""A conversion is checked by the code that will load it, and one that went wrong leaves nothing."""
from __future__ import annotations

import dataclasses
import json
import re

import pytest
import torch
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from hrm_megatron.config import Architecture, ConfigError
from hrm_megatron.convert import comparison, run
from hrm_megatron.convert.comparison import native_tensors
from hrm_megatron.convert.engine_names import ENGINES, FUSED, IN_MODULES, check_names, complaints
from hrm_megatron.convert.hf_files import MODULES, parts_of
from hrm_megatron.convert.run import Conversion, convert
from hrm_megatron.convert.table import GatedQKV, table

ARCHITECTURE = Architecture(2, 24, 3, 256, 250)


@pytest.fixture
def job(golden, tmp_path):
    """A conversion of the golden native checkpoint."""
    return lambda **fields: Conversion(**dict(
        load=golden / "native_ckpt", load_format="native", save=tmp_path / "out", save_format="hf") | fields)


@pytest.mark.parametrize("save_format", ["hf", "megatron", "native"])
def test_every_format_is_loaded_and_compared(job, tmp_path, save_format):
    said = convert(job(save_format=save_format))
    assert "its logits are the source's within " in said and " on 4 PrefixLM rows" in said
    difference = float(said.split("within ")[1].split()[0])
    assert difference < 1e-5 and (save_format == "hf" or difference == 0)  # by the same code, but in transformers
    if save_format == "hf":
        bf16 = convert(job(dtype="bfloat16", save=tmp_path / "bf16"))
        assert "its logits are those of the source rounded to bfloat16 within " in bf16
        assert float(bf16.split("within ")[1].split()[0]) < 1e-5
        back = convert(job(load=tmp_path / "out", load_format="hf", save=tmp_path / "m", save_format="megatron"))
        assert "within" in back and "train from them with --finetune" in back


def test_both_models_are_computed_on_the_cpu(job, monkeypatch):
    """A GPU can be full, and multiplies fp32 in TF32 where that is exported."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    configs, build = [], comparison.HRMModel
    monkeypatch.setattr(comparison, "HRMModel", lambda config, **rest: configs.append(config) or build(config, **rest))
    assert "its logits are the source's within " in convert(job())
    assert [(each.use_cpu_initialization, each.bias_activation_fusion) for each in configs] == [(True, False)]


@pytest.mark.parametrize("save_format", ["hf", "megatron", "native", "gguf"])
def test_wrong_weights_are_found_by_their_logits(job, tmp_path, monkeypatch, save_format):
    """Gate and keys swapped where tensors are written: shapes, names and checksums are all in order."""
    stock, writer = GatedQKV.from_megatron, f"write_{save_format}"
    write = getattr(run, writer)

    def swapped(self, tensor):
        gate, query, key, value = stock(self, tensor).chunk(4)
        return torch.cat([key, query, gate, value])

    def write_swapped(checkpoint, *arguments):
        wrong = dataclasses.replace(checkpoint, read=lambda part, entry: entry.to_megatron(
            swapped(entry, checkpoint.read(part, entry))) if isinstance(entry, GatedQKV)
            else checkpoint.read(part, entry))
        write(wrong, *arguments)

    monkeypatch.setattr(run, writer, write_swapped)
    with pytest.raises(ConfigError, match=rf"^{re.escape(str(tmp_path / 'out'))}: computes other logits than "
                                          r".*native_ckpt on 4 PrefixLM rows \(\d"):
        convert(job(save_format=save_format))
    assert not [*tmp_path.iterdir()]
    assert "were not compared with the source's (--no-verify)" in convert(job(save_format=save_format, verify=False))


def test_logits_of_a_source_that_has_none_are_not_compared(job, monkeypatch):
    stock = run.read_native

    def diverged(*arguments):
        source = stock(*arguments)
        return dataclasses.replace(source, read=lambda part, entry: source.read(part, entry).sign() * 3e38
                                   if entry.hf == "lm_head.weight" else source.read(part, entry))

    monkeypatch.setattr(run, "read_native", diverged)
    assert "were not compared with the source's, which are NaN or infinite" in convert(job(save_format="megatron"))


def test_large_models_are_compared_on_demand(job, monkeypatch):
    monkeypatch.setattr(run, "VERIFIED_PARAMETERS", 1000)
    said = convert(job())
    assert "were not compared with the source's (0.0 billion parameters; --verify compares them)" in said
    assert "within" in convert(job(verify=True, overwrite=True))


def test_rows_fit_the_model(golden):
    for max_tokens, count in ((4096, 4), (10, 3), (9, 2), (2, 1)):
        rows = comparison.examples(ARCHITECTURE, max_tokens)
        assert len(rows) == count and all(len(prefix) + len(target) <= max(max_tokens, 4) for prefix, target in rows)


def test_the_list_of_hrm_texts_keys_is_the_golden_one(golden):
    keys = json.loads((golden / "native_ckpt.json").read_text())["keys"]
    expected = {key: (tuple(entry["shape"]), entry["dtype"]) for key, entry in keys.items()
                if entry["kind"] == "tensor"}
    ours = native_tensors(Architecture(num_layers=1, hidden_size=24, num_attention_heads=2, ffn_hidden_size=256,
                                       vocab_size=256))
    assert {key: (shape, str(dtype)) for key, (shape, dtype) in ours.items()} == expected


def names(layer=FUSED):
    return {entry.hf for entry in table(ARCHITECTURE)} if layer == FUSED else {
        part for entry in table(ARCHITECTURE) for part in (parts_of(entry.hf) or [entry.hf])}


def test_every_engine_takes_our_names():
    assert len({engine.name for engine in ENGINES}) == 4 and all(engine.version and engine.source for engine in ENGINES)
    assert not complaints(names(), ARCHITECTURE.num_layers)
    check_names("here", names(), ARCHITECTURE.num_layers)


def test_what_an_engine_would_lose_is_named():
    said = complaints(names(IN_MODULES), ARCHITECTURE.num_layers)
    assert not any("transformers" in line for line in said)
    [skipped] = [line for line in said if "L_module.layers.1.self_attn.q_proj" in line and "SGLang" in line]
    assert "does not know" in skipped and skipped.endswith("skips it silently")
    lost = names() - {"model.z_L_init"} | {"lm_head.bias"}
    said = complaints(lost, ARCHITECTURE.num_layers)
    for engine in ENGINES:
        assert f"{engine.name} ({engine.version}) needs model.z_L_init" in said
        assert f"{engine.name} ({engine.version}) does not know lm_head.bias: it {engine.unknown}" in said
    with pytest.raises(ConfigError, match=r"^here: transformers \(5\.24\.0\) needs model\.z_L_init; and 7 more;"):
        check_names("here", lost, ARCHITECTURE.num_layers)
    assert complaints(names(), ARCHITECTURE.num_layers + 1)


def test_parts_are_those_of_the_installed_transformers():
    """Its own table of names is the oracle for ours, and for the list that the exports are checked against."""
    theirs = {}
    for conversion in get_checkpoint_conversion_mapping("hrm_text"):
        [source] = conversion.source_patterns
        theirs[source.replace("\\.", ".").strip(".")] = [
            target.replace("\\.", ".").strip(".") for target in conversion.target_patterns]
    ours = {fused.strip("."): [part.strip(".") for part in parts] for fused, parts in MODULES.items()}
    assert {name.removesuffix(".weight"): [target.removesuffix(".weight") for target in targets]
            for name, targets in theirs.items()} == ours
    assert sorted(IN_MODULES) == sorted({part.removeprefix("model.L_module.layers.0.") for part in names(IN_MODULES)
                                         if ".L_module.layers.0." in part})
