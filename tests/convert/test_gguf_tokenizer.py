"""The tokenizer in a file for llama.cpp: its fields, and the tokenizers that it would read otherwise."""
from __future__ import annotations

import json

import pytest
from gguf import GGUFReader, TokenType

from hrm_megatron.config import ConfigError
from hrm_megatron.convert.gguf_file import GGUF_FILE, write_gguf
from tests.convert.test_gguf import checkpoint, files, tokenizer, values  # noqa: F401  # fixtures


def test_the_tokenizer_is_llama_cpps(files, tokenizer):  # noqa: F811
    found = values(files["float32"])
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    config = json.loads(tokenizer.path.read_text())
    assert len(tokens) == len(kinds) == 512 == len({*tokens})
    for token, i in tokenizer.tokenizer.get_vocab().items():
        assert tokens[i] == token
        assert kinds[i] == (TokenType.CONTROL if token in tokenizer.special_ids else TokenType.NORMAL)
    beyond = [*range(tokenizer.vocab_size, 512)]
    assert {kinds[i] for i in beyond} == {TokenType.UNUSED}
    assert found["tokenizer.ggml.suppress_tokens"] == beyond
    assert [merge.split(" ") for merge in found["tokenizer.ggml.merges"]] == config["model"]["merges"] != []
    assert (found["tokenizer.ggml.model"], found["tokenizer.ggml.pre"]) == ("gpt2", "qwen2")
    assert [found[f"tokenizer.ggml.{role}_token_id"] for role in ("bos", "eos", "eot", "padding")] \
        == [tokenizer.boq, tokenizer.eoa, tokenizer.eoa, tokenizer.special_ids["<|PAD|>"]]
    assert not any(found[f"tokenizer.ggml.add_{what}"] for what in ("bos_token", "eos_token", "space_prefix"))
    assert "messages" in found["tokenizer.chat_template"]


def test_tokens_that_a_text_may_hold_are_no_control_tokens(checkpoint, tokenizer, tmp_path):  # noqa: F811
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "tokenizer.json").write_text(tokenizer.path.read_text())
    info = json.loads(tokenizer.path.with_name("tokenizer_info.json").read_text())
    (folder / "tokenizer_info.json").write_text(json.dumps(info | {"control_tokens_in_text": ["<think>"]}))
    write_gguf(checkpoint, tmp_path, tokenizer=folder)
    found = values(GGUFReader(tmp_path / GGUF_FILE))
    think = found["tokenizer.ggml.tokens"].index("<think>")
    assert found["tokenizer.ggml.token_type"][think] == TokenType.USER_DEFINED
    assert found["tokenizer.ggml.token_type"][think + 1] == TokenType.CONTROL


def rename(config, old, new):
    vocabulary = config["model"]["vocab"]
    vocabulary[new] = vocabulary.pop(old)
    [token] = [token for token in config["added_tokens"] if token["content"] == old]
    token["content"] = new


@pytest.mark.parametrize("change, message", [
    (lambda config: config["model"].update(byte_fallback=True), "its model is not plain BPE"),
    (lambda config: config.update(normalizer={"type": "NFKC"}), "its normalizer is NFKC"),
    (lambda config: config["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\s+"), "splits texts in"),
    (lambda config: config["pre_tokenizer"]["pretokenizers"][1].update(use_regex=True), "splits texts in"),
    (lambda config: config["pre_tokenizer"]["pretokenizers"].pop(0), "splits texts in"),
    (lambda config: rename(config, "<|vision_start|>", "[PAD511]"), "called as llama.cpp calls rows without"),
])
def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(checkpoint, tokenizer, tmp_path, change, message):  # noqa: F811
    config = json.loads(tokenizer.path.read_text())
    change(config)
    (tmp_path / "tokenizer.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=rf"tokenizer\.json: .*{message}.*leave --tokenizer-model out"):
        write_gguf(checkpoint, tmp_path / "out", tokenizer=tmp_path)


@pytest.mark.parametrize("digits, whole_words, name", [("", False, "qwen2"), ("{1,3}", False, "dbrx"),
                                                       ("{1,3}", True, "llama-bpe")])
def test_the_way_of_splitting_has_a_name(checkpoint, tokenizer, tmp_path, digits, whole_words, name):  # noqa: F811
    config = json.loads(tokenizer.path.read_text())
    pattern = config["pre_tokenizer"]["pretokenizers"][0]["pattern"]
    assert r"|\p{N}|" in pattern["Regex"]
    pattern["Regex"] = pattern["Regex"].replace(r"|\p{N}|", rf"|\p{{N}}{digits}|")
    config["model"]["ignore_merges"] = whole_words
    (tmp_path / "tokenizer.json").write_text(json.dumps(config))
    write_gguf(checkpoint, tmp_path / "out", tokenizer=tmp_path)
    assert values(GGUFReader(tmp_path / "out" / GGUF_FILE))["tokenizer.ggml.pre"] == name
