from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, HrmTextConfig, HrmTextForCausalLM

from hrm_megatron.config import Architecture, ConfigError
from hrm_megatron.convert.hf import read_hf, write_hf
from hrm_megatron.convert.hf_ticks import bp_list
from hrm_megatron.convert.ledger import EXPORT_FILE
from hrm_megatron.convert.native import read_native, write_native
from hrm_megatron.convert.run import Conversion, convert
from hrm_megatron.data.batch import PackedBatch, assemble_row
from hrm_megatron.data.spelling import BOQ, EOQ
from hrm_megatron.data.tokenizer import save_tokenizer, train_tokenizer
from hrm_megatron.model.hrm import HRMModel
from hrm_megatron.parallel.single import single_rank
from hrm_megatron.transformer_config import hrm_config
from tests.convert.records import make_older


@pytest.fixture(scope="module")
def exported(golden, tmp_path_factory):
    """Folders of the golden native checkpoint, by kind of weights."""
    folder = tmp_path_factory.mktemp("hf")
    for kind in ("ema", "raw"):
        write_hf(read_native(golden / "native_ckpt"), folder / kind, kind)
    return folder


def test_the_export_is_the_golden_one_bitwise(golden, exported):
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (exported / "ema", golden / "hf_export/ema"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in theirs)
    ours, theirs = (json.loads((folder / "config.json").read_text())
                    for folder in (exported / "ema", golden / "hf_export" / "ema"))
    assert ours == theirs


@pytest.mark.parametrize("kind", ["ema", "raw"])
def test_transformers_computes_the_logits_of_the_reference(golden, exported, kind):
    model = AutoModelForCausalLM.from_pretrained(exported / kind)
    logits = load_file(golden / "hf_logits.safetensors")
    for i, prompt in enumerate(json.loads((golden / "hf_logits.json").read_text())["prompts"]):
        types = [1] * len(prompt["prefix"]) + [0] * len(prompt["response"])
        with torch.no_grad():
            ours = model(torch.tensor([prompt["prefix"] + prompt["response"]]), token_type_ids=torch.tensor([types]))
        torch.testing.assert_close(ours.logits[0], logits[f"{kind}.p{i}.reference_logits"], rtol=0, atol=1e-5)


def test_transformers_generates_the_tokens_of_the_reference(golden, exported):
    model = AutoModelForCausalLM.from_pretrained(exported / "ema")
    for prompt in json.loads((golden / "generate.json").read_text())["prompts"]:
        ids = torch.tensor([prompt["prompt"]])
        out = model.generate(ids, token_type_ids=torch.ones_like(ids), attention_mask=torch.ones_like(ids),
                             max_new_tokens=10, do_sample=False, eos_token_id=None)
        assert out[0, ids.shape[1]:].tolist() == prompt["greedy_tokens"]


def test_a_model_of_transformers_computes_the_same_in_megatron(tmp_path):
    config = HrmTextConfig(vocab_size=256, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
                           num_attention_heads=3, head_dim=8, H_cycles=3, L_cycles=2, initializer_range=0.1,
                           max_position_embeddings=32)
    torch.manual_seed(1)
    theirs = HrmTextForCausalLM(config)
    theirs.model.z_L_init.data.copy_(torch.randn(24).bfloat16())
    theirs.save_pretrained(tmp_path)
    checkpoint = read_hf(tmp_path)
    assert checkpoint.architecture.num_layers == 2  # transformers stores 2 * 3 * (2 + 1)
    assert checkpoint.architecture.embedding_scale == pytest.approx(10)
    prefix, target = torch.arange(3, 10).numpy(), torch.arange(20, 26).numpy()
    row = assemble_row([(prefix, target)], 12)
    batch = PackedBatch.from_rows({name: tensor[None] for name, tensor in row.items()})
    with single_rank(), torch.no_grad():
        ours = HRMModel(hrm_config(checkpoint.architecture, use_cpu_initialization=True), seed=5).eval()
        missing, unexpected = ours.load_state_dict(dict(checkpoint.weights("raw")), strict=False)
        assert not unexpected and all("_extra_state" in name for name in missing)
        logits = ours.logits_at(ours.states(batch), torch.arange(12))
        types = torch.tensor([[1] * 7 + [0] * 5])
        expected = theirs(batch.tokens, token_type_ids=types).logits[0]
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_shards_and_bfloat16(tmp_path, random_checkpoint):
    checkpoint = random_checkpoint()
    write_hf(checkpoint, tmp_path, "ema", "bfloat16", max_shard_size="30KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    again, expected = dict(read_hf(tmp_path).weights("raw")), dict(checkpoint.weights("ema"))
    assert all(torch.equal(again[name].float(), expected[name].bfloat16().float()) for name in expected)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16
    for size in ("much", "GB", "0GB", "0.0KB", "-1GB", "nanGB", "1GBs"):
        with pytest.raises(ConfigError, match=f"--max-shard-size {size}: .*5GB"):
            write_hf(checkpoint, tmp_path, max_shard_size=size)


def test_weights_and_architecture_survive(tmp_path, random_checkpoint):
    checkpoint = random_checkpoint(Architecture(2, 24, 3, 40, 256, h_cycles=3, l_cycles=2, init_scheme="fixed_normal",
                                                init_std=0.05, rope_theta=5e4, norm_epsilon=1e-5))
    write_hf(checkpoint, tmp_path, "raw")
    again = read_hf(tmp_path)
    assert again.architecture == checkpoint.architecture
    assert again.training.bp_max_steps == checkpoint.training.bp_max_steps
    assert all(torch.equal(one, other) and one.dtype == other.dtype for (_, one), (_, other) in
               zip(again.weights("raw"), checkpoint.weights("raw"), strict=True))


def test_transformers_never_answers_with_padding_of_the_vocabulary(tmp_path, random_checkpoint):
    checkpoint = random_checkpoint(Architecture(1, 24, 3, 40, 12))  # 244 of 256 rows of the head stand for no token
    write_hf(checkpoint, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = torch.tensor([[1, 2]])
    out = model.generate(prompt, token_type_ids=torch.ones_like(prompt), max_new_tokens=8, do_sample=False,
                         eos_token_id=-1)
    assert out.shape == (1, 10) and out.max() < 12


def test_the_tokenizer_makes_a_prompt_a_prefix(golden, tmp_path, random_checkpoint):
    tokenizer = train_tokenizer(["What is three plus four?"] * 3, 300)
    tokenizer.post_processor = None
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    checkpoint = random_checkpoint(Architecture(1, 24, 3, 40, tokenizer.get_vocab_size()))
    write_hf(checkpoint, tmp_path / "hf", tokenizer=tmp_path / "tokenizer")
    assert {path.name for path in (tmp_path / "hf").iterdir()} >= {"tokenizer.json", "tokenizer_config.json"}
    loaded = AutoTokenizer.from_pretrained(tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    prompt = loaded(f"{BOQ}three{EOQ}", return_tensors="pt")
    assert prompt["token_type_ids"].eq(1).all() and prompt["input_ids"][0, 0] == 6
    assert loaded("three", "four")["token_type_ids"][-1] == 0
    out = model.generate(**prompt, max_new_tokens=1, do_sample=False)
    with torch.no_grad():
        both_ways, causal = (model(prompt["input_ids"], token_type_ids=types).logits[0, -1]
                             for types in (prompt["token_type_ids"], torch.zeros_like(prompt["token_type_ids"])))
    assert out[0, -1] == both_ways[:len(loaded)].argmax() and not torch.allclose(both_ways, causal)
    assert (model.generation_config.bos_token_id, model.generation_config.eos_token_id) == (6, 11)
    other = dataclasses.replace(checkpoint.architecture, vocab_size=700)
    with pytest.raises(ConfigError, match="has 300 tokens, the model random was trained with 700; .*--tokenizer-model"):
        write_hf(random_checkpoint(other), tmp_path / "wrong", tokenizer=tmp_path / "tokenizer")


def test_gradient_ticks_are_listed_per_cycle():
    assert [bp_list(2, 3, bp) for bp in (2, 3, 5, 8)] == [[0, 1], [0, 1], [0, 3], [3, 3]]
    assert bp_list(3, 2, 7) == [0, 2, 2]


@pytest.mark.parametrize("h_cycles, l_cycles", [(2, 3), (3, 2), (1, 2)])
def test_gradient_ticks_come_back_where_the_config_cannot_say_them(tmp_path, random_checkpoint, h_cycles, l_cycles):
    random = random_checkpoint(Architecture(1, 24, 3, 256, 256, h_cycles=h_cycles, l_cycles=l_cycles))
    for steps in range(2, h_cycles * (l_cycles + 1) + 1):
        native, folder, again = (tmp_path / f"{name} {steps}" for name in ("native", "hf", "again"))
        training = dataclasses.replace(random.training, bp_max_steps=steps)
        write_native(dataclasses.replace(random, training=training), native)
        convert(Conversion(native, "native", folder, "hf", verify=False))
        convert(Conversion(folder, "hf", again, "hf", verify=False))
        assert read_hf(again).training.bp_max_steps == steps
    (tmp_path / "hf 2" / EXPORT_FILE).unlink()  # transformers gives each H tick a gradient
    assert read_hf(tmp_path / "hf 2").training.bp_max_steps == h_cycles + 1
    shutil.copy(tmp_path / "hf 2" / "config.json", folder / "config.json")  # changed behind the export
    with pytest.raises(ConfigError, match="is not what was exported"):
        read_hf(folder)
    make_older(folder)
    assert read_hf(folder).training.bp_max_steps == h_cycles + 1


def test_post_norm_has_no_place_in_transformers(tmp_path, random_checkpoint):
    architecture = Architecture(1, 24, 3, 40, 256, norm_placement="post")
    with pytest.raises(ConfigError, match="random: post-norm layers, .*save as megatron or native"):
        write_hf(random_checkpoint(architecture), tmp_path)


@pytest.mark.parametrize("change, message", [
    (dict(model_type="llama"), r"config\.json: model_type: 'llama' is not the HRM"),
    (dict(num_layers_per_stack=2), "tensors missing: "),
    (dict(intermediate_size=512), "has shape .*its settings ask for"),
    (dict(head_dim=128), "head_dim: 128 is not hidden_size / num_attention_heads = 12"),
    (dict(vocab_size=255), "vocab_size: 255 is no multiple of 256"),
    (dict(tie_word_embeddings=True), "tie_word_embeddings: True"),
    (dict(rope_parameters={"rope_type": "yarn"}), "rope_type: 'yarn' is not built here"),
    (dict(rope_scaling={"type": "linear", "factor": 4.0}), "rope_type: 'linear' is not built here"),
    (dict(rope_scaling=[4]), "odd one"),
    (dict(hidden_size="64"), r"config\.json: hidden_size: '64' is no whole number"),
    (dict(eos_token_id=[11, "end"]), r"config\.json: eos_token_id: .*'end'\] is no token id"),
    (dict(num_layers_per_stack=10**9), "8,000,000,000 layers one after the other, of at most 1,000,000; correct them"),
    (dict(L_cycles=10**9), "layers one after the other, of at most 1,000,000; correct them"),
    (dict(H_cycles=None), "H_cycles: None is no whole number"),
    (dict(initializer_range="0.02", embedding_scale=None), "initializer_range: '0.02' is no number"),
    (dict(max_position_embeddings=0), r"config\.json: seq_length=0: must be at least 1"),
    (dict(rope_parameters={"rope_theta": 0}), r"config\.json: rope_theta=0.0: must be a number above 0"),
    (dict(rms_norm_eps=math.nan), r"config\.json: norm_epsilon=nan: must be a number from 0 on"),
    (dict(embedding_scale=None, initializer_range=0), "odd one .float division by zero"),
])
def test_a_config_that_does_not_fit_is_refused_by_name(golden, tmp_path, change, message):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((golden / "hf_export" / "ema" / name).read_bytes())
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=message):
        read_hf(tmp_path)


@pytest.mark.parametrize("value", [1.5, 2.0, "2", True], ids=repr)
@pytest.mark.parametrize("name", ["H_cycles", "L_cycles", "L_bp_cycles", "hidden_size", "num_hidden_layers",
                                  "num_attention_heads", "head_dim", "intermediate_size", "vocab_size",
                                  "max_position_embeddings"])
def test_a_count_that_is_no_whole_number_is_not_made_one(golden, tmp_path, name, value):
    shutil.copytree(golden / "hf_export" / "ema", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {name: [value, 2] if name == "L_bp_cycles" else value}
    config.pop("num_layers_per_stack", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=rf"config\.json: {name}: {re.escape(repr(value))} is no whole number"):
        read_hf(tmp_path)


@pytest.mark.parametrize("value", [None, 0, -1, 10**9, 10**30, 2.5, "x", "", [1], {"a": 1}, True, math.nan, math.inf,
                                   -1e400], ids=str)
def test_no_value_of_a_config_is_more_than_a_refusal(golden, tmp_path, value):
    shutil.copy(golden / "hf_export" / "ema" / "model.safetensors", tmp_path)
    config = json.loads((golden / "hf_export" / "ema" / "config.json").read_text())
    refused = 0
    for name in config:
        (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
        try:
            read_hf(tmp_path)
        except ConfigError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 5


def test_missing_and_damaged_files_are_named(golden, tmp_path):
    with pytest.raises(ConfigError, match=r"config\.json: cannot read"):
        read_hf(tmp_path)
    (tmp_path / "config.json").write_bytes((golden / "hf_export/ema/config.json").read_bytes())
    with pytest.raises(ConfigError, match=r"model\.safetensors: cannot read"):
        read_hf(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((golden / "hf_export/ema/model.safetensors").read_bytes()[:5000])
    with pytest.raises(ConfigError, match=r"model\.safetensors: cannot read"):
        read_hf(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin: a pickle, which can run code .*save it as safetensors"):
        read_hf(tmp_path)
    for index in ("[1]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"lm_head.weight": 1}}'):
        (tmp_path / "model.safetensors.index.json").write_text(index)
        with pytest.raises(ConfigError, match=r"index\.json: (holds no settings|does not say which file)"):
            read_hf(tmp_path)


@pytest.fixture
def sharded(tmp_path, random_checkpoint):
    """An export in several files."""
    write_hf(random_checkpoint(), tmp_path / "hf", "raw", max_shard_size="30KB")
    return tmp_path / "hf"


def test_one_file_of_all_weights_goes_before_an_index_as_in_transformers(sharded):
    model = AutoModelForCausalLM.from_pretrained(sharded)
    model.lm_head.weight.data.mul_(2)
    model.save_pretrained(sharded)  # which leaves the old index
    assert (sharded / "model.safetensors.index.json").exists()
    head = dict(read_hf(sharded, verify=False).weights("raw"))["output_layer.weight"]
    assert torch.equal(head, AutoModelForCausalLM.from_pretrained(sharded).lm_head.weight)


def test_the_start_of_z_l_is_not_rounded(tmp_path, random_checkpoint):
    write_hf(random_checkpoint(), tmp_path, "raw")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.z_L_init"][3] = 1.001
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"model\.z_L_init: holds 1\.001\d*, which bfloat16 does not have"):
        dict(read_hf(tmp_path, verify=False).weights("raw"))


def test_a_weight_that_bfloat16_does_not_reach_is_named(tmp_path, random_checkpoint):
    checkpoint = random_checkpoint()
    huge = dataclasses.replace(checkpoint, read=lambda part, entry: checkpoint.read(part, entry).sign() * 3.4e38
                               if entry.hf == "lm_head.weight" else checkpoint.read(part, entry))
    write_hf(huge, tmp_path / "float32")
    with pytest.raises(ConfigError, match=r"^lm_head\.weight: holds -?3\.4e\+38, which bfloat16 does not reach;"):
        write_hf(huge, tmp_path / "bfloat16", dtype="bfloat16")


@pytest.mark.parametrize("file", ["../model-00001-of-00002.safetensors", "/etc/passwd", "pytorch_model.bin",
                                  "nested/a.safetensors"])
def test_an_index_that_leaves_the_folder_is_refused(sharded, file):
    place = sharded / "model.safetensors.index.json"
    index = json.loads(place.read_text())
    index["weight_map"]["lm_head.weight"] = file
    place.write_text(json.dumps(index))
    with pytest.raises(ConfigError, match=f"index.json: says that lm_head.weight is in '{file}'; only safetensors"):
        read_hf(sharded)


def test_an_index_and_files_that_differ_are_refused(sharded):
    place = sharded / "model.safetensors.index.json"
    index = json.loads(place.read_text())
    files = index["weight_map"]
    for name, file, message in (
            ("lm_head.weight", files["model.z_L_init"], r"lm_head\.weight is not in .*, where it should be"),
            ("lm_head.bias", files["lm_head.weight"], r"lm_head\.bias is not in")):
        place.write_text(json.dumps({"weight_map": {**files, name: file}}))
        with pytest.raises(ConfigError, match=f"index.json: {message}"):
            read_hf(sharded)
    place.write_text(json.dumps({"weight_map": {**files, "a": "copy.safetensors"}}))
    path = sharded / files["lm_head.weight"]
    (sharded / "copy.safetensors").write_bytes(path.read_bytes())
    with pytest.raises(ConfigError, match=r"holds \S+, which \S+ holds too"):
        read_hf(sharded)


def test_the_names_of_transformers_modules_are_read(tmp_path, random_checkpoint):
    checkpoint = random_checkpoint()
    write_hf(checkpoint, tmp_path / "fused", "raw")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "fused")
    model.save_pretrained(tmp_path / "split", save_original_format=False)
    names = load_file(tmp_path / "split" / "model.safetensors").keys()
    assert "model.L_module.layers.1.self_attn.q_proj.weight" in names
    assert not any("gqkv" in name for name in names)
    again = read_hf(tmp_path / "split")
    assert all(torch.equal(tensor, dict(checkpoint.weights("raw"))[name]) for name, tensor in again.weights("raw"))
    write_hf(again, tmp_path / "fused again", "raw")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("fused", "fused again"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("change, message", [
    (lambda tensors: tensors.pop("model.H_module.layers.0.self_attn.k_proj.weight"),
     r"tensors missing: model\.H_module\.layers\.0\.self_attn\.k_proj\.weight"),
    (lambda tensors: tensors.update({"model.H_module.layers.0.attn.gqkv_proj.weight": torch.zeros(96, 24)}),
     r"tensors left over: model\.H_module\.layers\.0\.self_attn\.gate_proj\.weight, .*k_proj"),
    (lambda tensors: tensors.update({"model.L_module.layers.1.mlp.up_proj.weight": torch.zeros(41, 24)}),
     r"up_proj\.weight has shape \[41, 24\], its settings ask for \[40, 24\]"),
])
def test_parts_that_are_not_a_whole_are_named(tmp_path, random_checkpoint, change, message):
    write_hf(random_checkpoint(), tmp_path / "fused", "raw")
    AutoModelForCausalLM.from_pretrained(tmp_path / "fused").save_pretrained(tmp_path / "split",
                                                                             save_original_format=False)
    tensors = load_file(tmp_path / "split" / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "split" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=message):
        read_hf(tmp_path / "split")
