"""Write a tokenizer for llama.cpp: byte-level BPE, its control tokens, and flags that no token is added to prompts."""
from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from hrm_megatron.config import ConfigError
from hrm_megatron.convert.chat_template import chat_template
from hrm_megatron.convert.hf_tokenizer import ExportTokenizer
from hrm_megatron.data.engine import PATTERNS

if TYPE_CHECKING:
    import gguf

# (split pattern, ignore_merges) -> llama.cpp's name of the pre-tokenizer: src/llama-vocab.cpp, llm_tokenizer_bpe.
PRE_TOKENIZERS = {(PATTERNS[0], False): "qwen2", (PATTERNS[1], False): "dbrx", (PATTERNS[1], True): "llama-bpe"}
SETTINGS_OF_BPE = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk",
                   "byte_fallback")


def write_tokenizer(writer: gguf.GGUFWriter, beside: ExportTokenizer, rows: int) -> None:
    """Write the tokenizer fields; the head has `rows` rows, those beyond the tokens are never to be sampled."""
    from gguf import TokenType

    text = beside.text
    config = json.loads(text.tokenizer.to_str())
    pre_tokenizer = _pre_tokenizer(beside, config)
    words = {i: token for token, i in text.tokenizer.get_vocab(with_added_tokens=True).items()}
    tokens = [words.get(i, f"[PAD{i}]") for i in range(rows)]
    if len({*tokens}) < rows:
        raise ConfigError(f"{text.path}: has tokens that are called as llama.cpp calls rows without one, [PAD...]; "
                          "leave --tokenizer-model out and give llama.cpp token ids")
    added = text.tokenizer.get_added_tokens_decoder()
    kinds = [TokenType.UNUSED if i not in words else TokenType.NORMAL if i not in added else
             TokenType.CONTROL if added[i].special else TokenType.USER_DEFINED for i in range(rows)]
    writer.add_tokenizer_model("gpt2")  # llama.cpp's name for byte-level BPE
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in config["model"]["merges"]])
    ids = beside.token_ids
    writer.add_bos_token_id(ids["bos_token_id"])
    writer.add_eos_token_id(ids["eos_token_id"])
    writer.add_eot_token_id(ids["eos_token_id"])  # else llama.cpp takes <|im_end|>, which ends a question here
    writer.add_pad_token_id(ids["pad_token_id"])
    # Prompts already hold all control tokens, from the template or from the caller.
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(chat_template(text.spelling))
    writer.add_array("tokenizer.ggml.suppress_tokens", [i for i in range(rows) if i not in words])


def _pre_tokenizer(beside: ExportTokenizer, config: dict[str, Any]) -> str:
    """Return llama.cpp's name of the pre-tokenizer; refuse a tokenizer that llama.cpp cannot reproduce."""
    model, steps = config["model"], (config["pre_tokenizer"] or {}).get("pretokenizers", [])
    splits = [step for step in steps if step["type"] == "Split"]
    how = (str(splits[0]["pattern"].get("Regex")) if splits else "", bool(model.get("ignore_merges")))
    reason = None
    if model["type"] != "BPE" or any(model.get(name) for name in SETTINGS_OF_BPE):
        reason = "its model is not plain BPE"
    elif config["normalizer"] not in (None, {"type": "NFC"}):
        reason = f"its normalizer is {config['normalizer'].get('type')}"
    elif [step["type"] for step in steps] != ["Split", "ByteLevel"] or how not in PRE_TOKENIZERS \
            or splits[0]["behavior"] != "Isolated" or splits[0]["invert"] or steps[1]["add_prefix_space"] \
            or steps[1]["use_regex"]:
        reason = "it splits texts in another way"
    if reason:
        raise ConfigError(f"{beside.text.path}: {reason}, which llama.cpp does not know; leave --tokenizer-model out "
                          "and give llama.cpp token ids")
    return PRE_TOKENIZERS[how]
