"""A file for llama.cpp, read back by gguf's own reader, and a forward pass made of nothing else."""
from __future__ import annotations

import dataclasses
import json
import re
import sys
import weakref

import numpy as np
import pytest
import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import load_file
from transformers import HrmTextForCausalLM

from hrm_megatron.config import Architecture, ConfigError
from hrm_megatron.convert.gguf_file import GGUF_FILE, Q8_0, check_gguf, write_gguf
from hrm_megatron.convert.gguf_names import GENERATIONS, complaints, expected_keys, expected_tensors
from hrm_megatron.convert.hf import write_hf
from hrm_megatron.convert.ledger import EXPORT_FILE, Ledger
from hrm_megatron.data.tokenizer import TextTokenizer, save_tokenizer, train_tokenizer

LAYERS, HIDDEN, HEADS, FFN = 2, 96, 3, 160  # all that is cut into blocks is a multiple of 32
DTYPES = {"float32": "F32", "bfloat16": "BF16", Q8_0: "Q8_0"}
BF16_BITS, FP16_BITS = 8, 11  # of the mantissa, with the one that is not stored


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer") / "trained"
    save_tokenizer(train_tokenizer(["What is three plus four?"] * 3, 300), folder)
    return TextTokenizer(folder)


@pytest.fixture(scope="module")
def checkpoint(random_checkpoint, tokenizer):
    """Weights as wide as those that training begins with; three H cycles of two L cycles."""
    wide = random_checkpoint(Architecture(LAYERS, HIDDEN, HEADS, FFN, tokenizer.vocab_size, h_cycles=3, l_cycles=2))
    return dataclasses.replace(wide, read=lambda part, entry: wide.read(part, entry) * wide.architecture.input_std)


@pytest.fixture(scope="module")
def files(checkpoint, tokenizer, tmp_path_factory):
    """A reader of each type's file."""
    folder = tmp_path_factory.mktemp("gguf")
    for dtype in DTYPES:
        write_gguf(checkpoint, folder / dtype, dtype=dtype, tokenizer=tokenizer.path)
    return {dtype: GGUFReader(folder / dtype / GGUF_FILE) for dtype in DTYPES}


@pytest.fixture(scope="module")
def export(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hf") / "hf"
    write_hf(checkpoint, folder)
    return folder


@pytest.fixture(scope="module")
def expected(export):
    """What each tensor is, in the words of llama.cpp, cut from the export for transformers."""
    theirs = {name: tensor.numpy() for name, tensor in load_file(export / "model.safetensors").items()}
    tensors = {"hrm.z_l_init": theirs["model.z_L_init"], "token_embd.weight": theirs["model.embed_tokens.weight"],
               "output.weight": theirs["lm_head.weight"]}
    for block in range(2 * LAYERS):
        layer = f"model.{'LH'[block // LAYERS]}_module.layers.{block % LAYERS}"
        names = ["attn_gate", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
        parts = [*np.split(theirs[f"{layer}.attn.gqkv_proj.weight"], 4), theirs[f"{layer}.attn.o_proj.weight"],
                 *np.split(theirs[f"{layer}.mlp.gate_up_proj.weight"], 2), theirs[f"{layer}.mlp.down_proj.weight"]]
        tensors |= {f"blk.{block}.{name}.weight": part for name, part in zip(names, parts, strict=True)}
    return tensors


def numbers(reader):
    return {tensor.name: dequantize(tensor.data, tensor.tensor_type).reshape(tensor.shape[::-1])
            for tensor in reader.tensors}


def test_fp32_is_bitwise(files, expected):
    found = numbers(files["float32"])
    assert found.keys() == expected.keys() and len(found) == 3 + 8 * 2 * LAYERS
    assert all(np.array_equal(found[name], tensor) for name, tensor in expected.items())


def test_bf16_is_rounded_once_and_q8_0_within_half_a_step(files, expected):
    for name, tensor in numbers(files["bfloat16"]).items():
        assert np.array_equal(tensor, expected[name] if name == "hrm.z_l_init" else
                              torch.from_numpy(expected[name]).to(torch.bfloat16).float().numpy())
    for name, tensor in numbers(files[Q8_0]).items():
        if name == "hrm.z_l_init":
            assert np.array_equal(tensor, expected[name])
            continue
        blocks, found = (array.reshape(-1, 32) for array in (expected[name], tensor))
        step = np.abs(blocks).max(1, keepdims=True) / 127
        # A whole number of steps, at most 127, and a step that is rounded to fp16.
        assert (np.abs(found - blocks) <= step * (0.5 + 127 * 2.0 ** -FP16_BITS) * (1 + 2.0 ** -20)).all()
        assert not np.array_equal(found, blocks)
    for dtype, reader in files.items():
        kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        assert kinds.pop("hrm.z_l_init") == "F32" and {*kinds.values()} == {DTYPES[dtype]}


def values(reader):
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


@pytest.mark.parametrize("generation, recurrence", [("nested", "hrm_text.hrm."), ("flat", "hrm_text.")])
def test_the_settings_are_those_that_llama_cpp_asks_for(checkpoint, tmp_path, generation, recurrence):
    write_gguf(checkpoint, tmp_path, keys=generation)
    found = values(GGUFReader(tmp_path / GGUF_FILE))
    assert found == {
        "general.architecture": "hrm_text", "general.type": "model", "general.file_type": 0,
        "general.quantization_version": 2, "tokenizer.ggml.model": "none", "hrm_text.context_length": 48,
        "hrm_text.embedding_length": 96, "hrm_text.feed_forward_length": 160, "hrm_text.vocab_size": 512,
        "hrm_text.embedding_scale": np.float32(96 ** 0.5), "hrm_text.block_count": 2 * 3 * (2 + 1),
        "hrm_text.attention.head_count": 3, "hrm_text.attention.head_count_kv": 3, "hrm_text.attention.key_length": 32,
        "hrm_text.attention.value_length": 32, "hrm_text.attention.layer_norm_rms_epsilon": np.float32(1e-6),
        "hrm_text.rope.dimension_count": 32, "hrm_text.rope.freq_base": 10_000.0, f"{recurrence}layers_per_stack": 2,
        f"{recurrence}h_cycles": 3, f"{recurrence}l_cycles": 2, f"{recurrence}prefix_lm": True,
    }
    check_gguf(tmp_path, checkpoint.architecture, generation, with_tokenizer=False)
    for other, with_tokenizer in ((generation, True), *((name, False) for name in GENERATIONS if name != generation)):
        with pytest.raises(ConfigError, match=r"model\.gguf: llama\.cpp .*0\.3\.36 needs "):
            check_gguf(tmp_path, checkpoint.architecture, other, with_tokenizer)
    with pytest.raises(ConfigError, match=r"needs blk\.4\.attn_gate\.weight; and 31 more"):
        check_gguf(tmp_path, dataclasses.replace(checkpoint.architecture, num_layers=4), generation, False)
    with pytest.raises(ConfigError, match=r"blk\.0\.ffn_gate\.weight is \(160, 96\), llama\.cpp .* wants \(192, 96\)"):
        check_gguf(tmp_path, dataclasses.replace(checkpoint.architecture, ffn_hidden_size=192), generation, False)


def test_what_llama_cpp_does_not_know_is_named():
    keys = expected_keys("nested", tokenizer=True, suppressed=True)
    said = complaints({**keys, "hrm_text.h_cycles": "UINT32", "hrm_text.block_count": "UINT64"}, keys)
    assert len(said) == 2 and "does not know hrm_text.h_cycles" in said[0]
    assert said[1].startswith("hrm_text.block_count is UINT64, llama.cpp") and said[1].endswith("wants UINT32")
    tensors = expected_tensors(Architecture(1, 32, 1, 64, 256))
    assert len(tensors) == 3 + 8 * 2 and not complaints(tensors, tensors)


def normed(x, epsilon):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def forward(reader, tokens, prefix):
    """Logits [s, v] by what the file says alone; the first `prefix` tokens see each other."""
    w = {name: tensor.astype(np.float64) for name, tensor in numbers(reader).items()}
    k = {name.removeprefix("hrm_text."): value for name, value in values(reader).items()}
    s, heads, head_dim = len(tokens), k["attention.head_count"], k["attention.key_length"]
    half = np.arange(head_dim // 2)
    angles = np.arange(s)[:, None] * k["rope.freq_base"] ** (-2 * half / head_dim)
    cos, sin = (np.concatenate([table, table], 1)[:, None] for table in (np.cos(angles), np.sin(angles)))
    seen = np.tri(s, dtype=bool)
    seen[:prefix, :prefix] = True

    def rotated(x):  # pairs are head_dim / 2 apart: NeoX's order
        return x * cos + np.concatenate([-x[..., head_dim // 2:], x[..., :head_dim // 2]], -1) * sin

    def stack(x, first):
        for block in range(first, first + k["hrm.layers_per_stack"]):
            def times(y, name, block=block):
                return y @ w[f"blk.{block}.{name}.weight"].T
            y = normed(x, k["attention.layer_norm_rms_epsilon"])
            query, key, value = (times(y, name).reshape(s, heads, head_dim) for name in ("attn_q", "attn_k", "attn_v"))
            scores = np.einsum("shd,thd->hst", rotated(query), rotated(key)) / np.sqrt(head_dim)
            scores = np.exp(np.where(seen, scores - scores.max(-1, keepdims=True), -np.inf))
            attended = np.einsum("hst,thd->shd", scores / scores.sum(-1, keepdims=True), value).reshape(s, -1)
            x = x + times(attended * sigmoid(times(y, "attn_gate")), "attn_output")
            y = normed(x, k["attention.layer_norm_rms_epsilon"])
            gate = times(y, "ffn_gate")
            x = x + times(gate * sigmoid(gate) * times(y, "ffn_up"), "ffn_down")
        return normed(x, k["attention.layer_norm_rms_epsilon"])

    z_h, z_l = w["token_embd.weight"][tokens] * k["embedding_scale"], w["hrm.z_l_init"]
    for _ in range(k["hrm.h_cycles"]):
        for _ in range(k["hrm.l_cycles"]):
            z_l = stack(z_h + z_l, 0)
        z_h = stack(z_h + z_l, k["hrm.layers_per_stack"])
    return z_h @ w["output.weight"].T


def test_the_file_alone_computes_what_transformers_computes(files, export):
    tokens, prefix = np.random.default_rng(3).integers(0, 280, 13), 8
    model = HrmTextForCausalLM.from_pretrained(export).eval()
    types = torch.tensor([[1] * prefix + [0] * (len(tokens) - prefix)])
    with torch.no_grad():
        theirs = model(torch.from_numpy(tokens)[None], token_type_ids=types).logits[0].numpy()
    ours = {dtype: forward(reader, tokens, prefix) for dtype, reader in files.items()}

    def distance(logits):
        return np.linalg.norm(logits - theirs) / np.linalg.norm(theirs)
    assert distance(ours["float32"]) < 1e-5  # fp32 there, some 36 layers deep
    # Errors of single weights, of some 2^-9 and 1/254 of the largest of 32, average out over the terms of a sum and add
    # up over the layers; another function is 0.1 away and more.
    assert 2.0 ** -14 < distance(ours["bfloat16"]) < 36 * 2.0 ** -BF16_BITS
    assert 2.0 ** -14 < distance(ours[Q8_0]) < 36 / 254
    assert distance(forward(files["float32"], tokens, 0)) > 0.1


def test_the_ledger_knows_the_bytes_in_the_file(checkpoint, tmp_path):
    ledger, passed = Ledger(), []
    ledger.passed = passed.append
    write_gguf(checkpoint, tmp_path, dtype=Q8_0, ledger=ledger)
    reader = GGUFReader(tmp_path / GGUF_FILE)
    assert ledger.tensors.keys() == {tensor.name for tensor in reader.tensors}
    assert sum(passed) == sum(int(tensor.n_bytes) for tensor in reader.tensors)
    assert ledger.tensors["blk.3.ffn_up.weight"]["dtype"] == Q8_0
    assert ledger.tensors["blk.3.ffn_up.weight"]["shape"] == [160, 96]


def test_one_tensor_of_a_checkpoint_is_in_memory(checkpoint, tmp_path):
    alive = weakref.WeakSet()

    def watched(part, entry):
        assert not alive, (part, entry.megatron)
        tensor = checkpoint.read(part, entry)
        alive.add(tensor)
        return tensor

    for dtype in DTYPES:
        write_gguf(dataclasses.replace(checkpoint, read=watched), tmp_path / dtype, dtype=dtype)


@pytest.fixture
def command(golden, tmp_path, tool, capsys):
    """Convert the golden native checkpoint with the tool; return (status, stdout, stderr)."""
    def call(*flags, save_format="gguf"):
        status = tool(["--load", str(golden / "native_ckpt"), "--load-format", "native", "--save",
                       str(tmp_path / "out"), "--save-format", save_format, *flags])
        captured = capsys.readouterr()
        return status, captured.out, captured.err
    return call


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("bfloat16", 1e-6)])
def test_the_tool_converts_verifies_and_warns(command, tmp_path, dtype, tolerance):
    status, out, _ = command("--dtype", dtype, "--gguf-keys", "flat")
    assert status == 0 and "ema weights of iteration 10, 11 tensors" in out
    assert "llama.cpp reads prompts causally unless it is told otherwise" in out and "no tokenizer in it" in out
    assert float(re.search(r"within (\S+) of their norm", out)[1]) < tolerance  # the same numbers, by the same code
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["README.md", EXPORT_FILE, GGUF_FILE]
    manifest = json.loads((tmp_path / "out" / EXPORT_FILE).read_text())
    assert (manifest["format"], manifest["settings"]["dtype"], len(manifest["tensors"])) == ("gguf", dtype, 19)
    assert "hrm_text.h_cycles" in GGUFReader(tmp_path / "out" / GGUF_FILE).fields
    status, _, err = command()
    assert status == 1 and "pass --overwrite to replace" in err
    assert command("--overwrite")[0] == 0


def test_blocks_of_8_bits_are_verified_against_the_same_rounding(checkpoint, tmp_path, tool, capsys):
    write_hf(checkpoint, tmp_path / "hf")
    assert tool(["--load", str(tmp_path / "hf"), "--load-format", "hf", "--save", str(tmp_path / "out"),
                 "--save-format", "gguf", "--dtype", Q8_0]) == 0
    assert float(re.search(r"within (\S+) of their norm", capsys.readouterr().out)[1]) < 1e-5


@pytest.mark.parametrize("flags, options, message", [
    (["--dtype", "q8_0"], {}, "takes rows of multiples of 32 weights, and .* has hidden size 24 and FFN 256; choose"),
    (["--dtype", "q8_0"], dict(save_format="hf"), "--dtype q8_0: is for --save-format gguf"),
    (["--gguf-keys", "flat"], dict(save_format="hf"), "--gguf-keys flat: is for --save-format gguf"),
    (["--max-shard-size", "1GB"], {}, "--max-shard-size 1GB: is for --save-format hf"),
    (["--data-report", "x.md"], {}, "--data-report x.md: cannot read .*give a Markdown file"),
    (["--evaluation", "x.md"], dict(save_format="native"), "--evaluation x.md: is for the README.md of"),
])
def test_bad_input_is_one_line(command, tmp_path, flags, options, message):
    status, out, err = command(*flags, **options)
    assert status == 1 and not out and err.startswith("error: ") and err.count("\n") == 1
    assert re.search(message, err) and not [*tmp_path.iterdir()]


def test_without_the_library_the_tool_says_which_extra_it_is(command, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    status, _, err = command()
    assert status == 1 and err == ("error: --save-format gguf needs gguf, which is not installed; pip install "
                                   "'hrm-megatron[gguf]'\n")
    assert command(save_format="hf")[0] == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_are_named_and_never_in_blocks(checkpoint, tmp_path, value):
    def read(part, entry):
        tensor = checkpoint.read(part, entry)
        if (part, entry.megatron) == ("ema", "h_stack.layers.1.mlp.linear_fc1.weight"):
            tensor[FFN + 3, 1] = value
        return tensor

    broken = dataclasses.replace(checkpoint, read=read)
    with pytest.raises(ConfigError, match=r"blk\.3\.ffn_up\.weight: 1 of 15360 numbers are NaN or infinite"):
        write_gguf(broken, tmp_path / "refused")
    ledger = Ledger(allow_nonfinite=True)
    write_gguf(broken, tmp_path / "told", ledger=ledger)
    assert ledger.not_finite == ["blk.3.ffn_up.weight"]
    with pytest.raises(ConfigError, match=r"blk\.3\.ffn_up\.weight: holds (nan|inf), which --dtype q8_0 cannot"):
        write_gguf(broken, tmp_path / "blocks", dtype=Q8_0, ledger=Ledger(allow_nonfinite=True))


def test_a_weight_that_bfloat16_does_not_reach_is_named(checkpoint, tmp_path):
    huge = dataclasses.replace(checkpoint, read=lambda part, entry: checkpoint.read(part, entry).sign() * 3.4e38
                               if entry.hf == "lm_head.weight" else checkpoint.read(part, entry))
    write_gguf(huge, tmp_path / "float32")
    with pytest.raises(ConfigError, match=r"^output\.weight: holds -?3\.4e\+38, which bfloat16 does not reach; choose"):
        write_gguf(huge, tmp_path / "bfloat16", dtype="bfloat16")


def test_post_norm_is_refused(random_checkpoint, tmp_path):
    post = random_checkpoint(Architecture(1, 24, 3, 40, 250, norm_placement="post"))
    with pytest.raises(ConfigError, match=r"post-norm layers, which llama\.cpp does not have"):
        write_gguf(post, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_card_masks_rows_without_a_token_of_a_model_that_knows_rows_only(checkpoint, tokenizer, tmp_path):
    rows = checkpoint.architecture.padded_vocab_size
    padded = dataclasses.replace(checkpoint, architecture=dataclasses.replace(checkpoint.architecture, vocab_size=rows),
                                 counts_tokens=False)
    for source in (checkpoint, padded):
        write_gguf(source, tmp_path, tokenizer=tokenizer.path)
        assert f"np.arange(len(logits)) < {tokenizer.vocab_size}," in (tmp_path / "README.md").read_text()
