"""The keys and tensors that llama.cpp's `hrm_text` expects in a GGUF file, with the version in which they were read.

There are two generations of keys, which differ in the names of the recurrence settings.
"""
from __future__ import annotations

from collections.abc import Mapping

from hrm_megatron.config import Architecture, ConfigError

LLAMA_CPP = "llama.cpp in the source package of llama_cpp_python 0.3.36"
ARCHITECTURE = "hrm_text"
# Generation -> prefix of the four recurrence settings. "nested": src/llama-arch.cpp. "flat": ggml-org/llama.cpp#27625
# before it was merged.
NESTED = "nested"
GENERATIONS = {NESTED: "hrm.", "flat": ""}
RECURRENCE = {"layers_per_stack": "UINT32", "h_cycles": "UINT32", "l_cycles": "UINT32", "prefix_lm": "BOOL"}
# src/llama-model.cpp (load_hparams), src/models/hrm-text.cpp
SETTINGS = {
    "context_length": "UINT32", "embedding_length": "UINT32", "feed_forward_length": "UINT32", "block_count": "UINT32",
    "vocab_size": "UINT32", "embedding_scale": "FLOAT32", "attention.head_count": "UINT32",
    "attention.head_count_kv": "UINT32", "attention.key_length": "UINT32", "attention.value_length": "UINT32",
    "attention.layer_norm_rms_epsilon": "FLOAT32", "rope.dimension_count": "UINT32", "rope.freq_base": "FLOAT32",
}
GENERAL = {"general.architecture": "STRING", "general.type": "STRING", "general.file_type": "UINT32",
           "general.quantization_version": "UINT32"}
NO_TOKENIZER = {"tokenizer.ggml.model": "STRING"}
# src/llama-vocab.cpp (load)
TOKENIZER = {
    **NO_TOKENIZER, "tokenizer.ggml.pre": "STRING", "tokenizer.ggml.tokens": "ARRAY",
    "tokenizer.ggml.token_type": "ARRAY", "tokenizer.ggml.merges": "ARRAY", "tokenizer.ggml.bos_token_id": "UINT32",
    "tokenizer.ggml.eos_token_id": "UINT32", "tokenizer.ggml.eot_token_id": "UINT32",
    "tokenizer.ggml.padding_token_id": "UINT32", "tokenizer.ggml.add_bos_token": "BOOL",
    "tokenizer.ggml.add_eos_token": "BOOL", "tokenizer.ggml.add_space_prefix": "BOOL",
    "tokenizer.chat_template": "STRING",
}
SUPPRESSED = {"tokenizer.ggml.suppress_tokens": "ARRAY"}  # present if the head has rows that stand for no token
OUTSIDE_LAYERS = {"model.z_L_init": "hrm.z_l_init", "model.embed_tokens.weight": "token_embd.weight",
                  "lm_head.weight": "output.weight"}
# Tensor in transformers -> GGUF names of its row blocks. The blocks of the L stack come before those of the H stack.
PARTS = {
    "attn.gqkv_proj.weight": ("attn_gate", "attn_q", "attn_k", "attn_v"),
    "attn.o_proj.weight": ("attn_output",),
    "mlp.gate_up_proj.weight": ("ffn_gate", "ffn_up"),
    "mlp.down_proj.weight": ("ffn_down",),
}


def names_of(hf_name: str, num_layers: int) -> tuple[str, ...]:
    """Return the GGUF names of the parts of a tensor, which is split along its rows."""
    if hf_name in OUTSIDE_LAYERS:
        return (OUTSIDE_LAYERS[hf_name],)
    _, stack, _, layer, name = hf_name.split(".", 4)  # model.L_module.layers.0.attn.o_proj.weight
    block = int(layer) + (num_layers if stack == "H_module" else 0)
    return tuple(f"blk.{block}.{part}.weight" for part in PARTS[name])


def expected_keys(generation: str, tokenizer: bool, suppressed: bool) -> dict[str, str]:
    """Return the type of every key of a file, by name."""
    return {**GENERAL, **(TOKENIZER if tokenizer else NO_TOKENIZER), **(SUPPRESSED if tokenizer and suppressed else {}),
            **{f"{ARCHITECTURE}.{name}": kind for name, kind in SETTINGS.items()},
            **{f"{ARCHITECTURE}.{GENERATIONS[generation]}{name}": kind for name, kind in RECURRENCE.items()}}


def expected_tensors(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of a file, by name, rows first."""
    h, ffn, vocab = architecture.hidden_size, architecture.ffn_hidden_size, architecture.padded_vocab_size
    shapes = {"attn_gate": (h, h), "attn_q": (h, h), "attn_k": (h, h), "attn_v": (h, h), "attn_output": (h, h),
              "ffn_gate": (ffn, h), "ffn_up": (ffn, h), "ffn_down": (h, ffn)}
    return {"hrm.z_l_init": (h,), "token_embd.weight": (vocab, h), "output.weight": (vocab, h),
            **{f"blk.{block}.{name}.weight": shape for block in range(2 * architecture.num_layers)
               for name, shape in shapes.items()}}


def complaints(found: Mapping[str, object], expected: Mapping[str, object]) -> list[str]:
    """List what llama.cpp would miss, not know, or find with another type or shape."""
    return [*(f"{LLAMA_CPP} needs {name}" for name in sorted(expected.keys() - found.keys())),
            *(f"{LLAMA_CPP} does not know {name}" for name in sorted(found.keys() - expected.keys())),
            *(f"{name} is {found[name]}, {LLAMA_CPP} wants {kind}" for name, kind in expected.items()
              if found.get(name, kind) != kind)]


def refuse(place: object, said: list[str]) -> None:
    """Raise ConfigError with the first of the complaints, if there are any."""
    if said:
        more = f"; and {len(said) - 1} more" if len(said) > 1 else ""
        raise ConfigError(f"{place}: {said[0]}{more}; please report it")
