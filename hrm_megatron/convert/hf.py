"""The folder that transformers' HrmText loads: config.json, safetensors and, optionally, the tokenizer."""
from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards

from hrm_megatron.checkpoint.stream import LazyTensor
from hrm_megatron.checkpoint.verify import UNVERIFIED
from hrm_megatron.config import CAUSAL, PREFIX_LM, Architecture, ConfigError, padded_vocab_size
from hrm_megatron.convert import prefix_generate
from hrm_megatron.convert.card import CARD_FILE, NO_SECTIONS, Sections, model_card
from hrm_megatron.convert.casts import as_start, rounded
from hrm_megatron.convert.checkpoint import EMA, RAW, TOKENS_KNOWN, Checkpoint, Origin, TokenIds, Training
from hrm_megatron.convert.hf_files import FLOATS, INDEX_FILE, LOW_BIT, HFFiles, read_json
from hrm_megatron.convert.hf_ticks import BP_CYCLES, bp_list, bp_steps_of
from hrm_megatron.convert.hf_tokenizer import ExportTokenizer, check_vocabulary
from hrm_megatron.convert.ledger import Ledger, check_settings, origin_of, setting_of
from hrm_megatron.convert.quantization import CONFIG_KEY, Quantization, Quantized
from hrm_megatron.convert.safetensors_file import write_safetensors
from hrm_megatron.convert.setting import number, whole
from hrm_megatron.convert.table import Rename, table
from hrm_megatron.data.spelling import BOQ, EOA, INFO_FILE, PAD, SPECIAL_TOKENS, Spelling
from hrm_megatron.data.tokenizer import TOKENIZER_FILE, vocabulary_beside
from hrm_megatron.model_types import HRM
from hrm_megatron.parallel.precision import DTYPES

HF_CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
GENERATE_FILE = "custom_generate/generate.py"  # name that transformers looks for
WITHOUT_CHECKSUMS = "has no checksums, so that its files were held against their headers only"
MAX_SHARD_SIZE = "5GB"
# Settings that every HRM has in transformers.
FIXED: dict[str, Any] = dict(model_type="hrm_text", tie_word_embeddings=False)
PREFIX = "prefix_lm"  # false in a causal model's config
SUPPRESSED = "suppress_tokens"  # in GENERATION_FILE: the rows of the head that stand for no token
# Ids in HRM-Text's tokenizers, for a model without a tokenizer.
TOKEN_IDS = {name: SPECIAL_TOKENS.index(token) for name, token in (
    ("pad_token_id", PAD), ("bos_token_id", BOQ), ("eos_token_id", EOA))}
# Settings that a config may omit, and the only values supported.
OPTIONAL: dict[str, Any] = dict(hidden_act="silu", attention_bias=False, mlp_bias=False)


def refuse_others(checkpoint: Checkpoint, program: str, way_out: str = "save as megatron or native") -> None:
    """Refuse a model that `program` does not support."""
    if checkpoint.architecture.model_type != HRM:
        raise ConfigError(f"{checkpoint.path}: a {checkpoint.architecture.kind.title}, which {program} does not have "
                          f"(gated PrefixLM layers with norms without weights, in its recurrence); {way_out}")
    if "post" in (checkpoint.architecture.norm_placement, checkpoint.architecture.h_norm_placement):
        raise ConfigError(f"{checkpoint.path}: post-norm layers, which {program} does not have; {way_out}")


def _config_of(checkpoint: Checkpoint, dtype: str, token_ids: Mapping[str, TokenIds]) -> dict[str, Any]:
    refuse_others(checkpoint, "transformers' HrmText")
    a, t = checkpoint.architecture, checkpoint.training
    return dict(
        FIXED, prefix_lm=not a.causal, architectures=["HrmTextForCausalLM"], vocab_size=a.padded_vocab_size,
        hidden_size=a.hidden_size, intermediate_size=a.ffn_hidden_size, num_hidden_layers=a.num_layers,  # per stack
        num_attention_heads=a.num_attention_heads, head_dim=a.head_dim, H_cycles=a.h_cycles, L_cycles=a.l_cycles,
        **{BP_CYCLES: bp_list(a.h_cycles, a.l_cycles, t.bp_max_steps)}, max_position_embeddings=t.seq_length,
        rms_norm_eps=a.norm_epsilon, rope_parameters=dict(rope_type="default", rope_theta=a.rope_theta),
        initializer_range=a.input_std, embedding_scale=a.embedding_scale, dtype=dtype, **token_ids)


def write_hf(checkpoint: Checkpoint, folder: Path, kind: str = EMA, dtype: str = "float32",
             tokenizer: str | Path | None = None, max_shard_size: str = MAX_SHARD_SIZE,
             ledger: Ledger | None = None, sections: Sections = NO_SECTIONS,
             quantized: Quantized | None = None) -> None:
    """Write the weights of this kind such that unmodified transformers computes the same logits.

    With a `tokenizer` (folder or tokenizer.json), `generate(**tokenizer(prompt))` attends bidirectionally in the
    prompt, as in training. One tensor is in memory at a time; `ledger` records them. `quantized` provides quantized
    matrices.
    """
    ledger = ledger or Ledger()
    check_shard_size(max_shard_size)
    checkpoint.require(kind)
    architecture, max_tokens = checkpoint.architecture, checkpoint.training.seq_length
    beside = None if tokenizer is None else ExportTokenizer.open(tokenizer)
    token_ids = token_ids_of(checkpoint, beside)
    config = _config_of(checkpoint, dtype, token_ids)
    if quantized:
        config[CONFIG_KEY] = quantized.quantization.config()
    folder.mkdir(parents=True, exist_ok=True)
    if beside:
        beside.write(folder, max_tokens, architecture.causal)
    tensors: dict[str, LazyTensor] = {}
    for entry in table(architecture):
        tensors |= (quantized.tensors(entry) if quantized else {}) or {
            entry.hf: _exported(checkpoint, kind, entry, DTYPES[dtype])}
    plan = split_torch_state_dict_into_shards(
        {name: torch.empty(lazy.shape, dtype=lazy.dtype, device="meta") for name, lazy in tensors.items()},
        max_shard_size=max_shard_size)
    for file, names in plan.filename_to_tensors.items():
        write_safetensors(folder / file, {name: ledger.noting(name, tensors[name]) for name in names})
    padding = list(range(num_tokens(architecture, beside), architecture.padded_vocab_size))
    files = {HF_CONFIG_FILE: config, GENERATION_FILE: {**token_ids, **({SUPPRESSED: padding} if padding else {})}}
    if plan.is_sharded:
        files[INDEX_FILE] = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
    for file, values in files.items():
        (folder / file).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    ledger.deciding += [HF_CONFIG_FILE, *([TOKENIZER_FILE, INFO_FILE] if beside else [])]
    card = model_card(checkpoint, dtype, beside.pad_token if beside else None, token_ids.get("bos_token_id", 0),
                      beside.text.spelling if beside else Spelling(), sections, quantized)
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
    if not architecture.causal:  # a causal model needs no token types
        (folder / GENERATE_FILE).parent.mkdir(exist_ok=True)
        shutil.copyfile(prefix_generate.__file__, folder / GENERATE_FILE)


def check_shard_size(spelled: str) -> None:
    """Refuse a value that is not a valid file size."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*[KMGT]B\s*", spelled, re.IGNORECASE)
    if found is None or float(found[1]) * 1000 < 1:  # zero or almost zero
        raise ConfigError(f"--max-shard-size {spelled}: no size of a file; write for example 5GB")


def _exported(checkpoint: Checkpoint, kind: str, entry: Rename, dtype: torch.dtype) -> LazyTensor:
    return LazyTensor(entry.foreign_shape, dtype, lambda: rounded(
        entry.hf, entry.from_megatron(checkpoint.part_of(kind, entry)), dtype))


def num_tokens(architecture: Architecture, beside: ExportTokenizer | None) -> int:
    """Return how many head rows stand for a token; if the model knows only its rows, the tokenizer decides."""
    return min(architecture.vocab_size, beside.text.vocab_size if beside else architecture.vocab_size)


def token_ids_of(checkpoint: Checkpoint, beside: ExportTokenizer | None) -> dict[str, TokenIds]:
    """Return the special token ids for transformers, all of them tokens of the model."""
    architecture = checkpoint.architecture
    if beside:
        check_vocabulary(beside.text, checkpoint)
    # Of a model that records only its rows: the tokenizer that fills them, as the export suppresses the other rows.
    if beside and architecture.vocab_size != (
            beside.text.vocab_size if checkpoint.tokens_known else padded_vocab_size(beside.text.vocab_size)):
        raise ConfigError(f"{beside.text.path}: has {beside.text.vocab_size} tokens, the model {checkpoint.path} was "
                          f"trained with {architecture.vocab_size}; give its own tokenizer as --tokenizer-model")
    token_ids: dict[str, TokenIds] = dict(beside.token_ids if beside else checkpoint.token_ids or TOKEN_IDS)
    theirs = checkpoint.token_ids.get("eos_token_id")
    if beside and isinstance(theirs, list) and beside.text.eoa in theirs:  # keep further eos ids of the source
        token_ids["eos_token_id"] = [*dict.fromkeys([beside.text.eoa, *theirs])]
    for name, ids in token_ids.items():
        if not all(0 <= i < architecture.vocab_size for i in (ids if isinstance(ids, list) else [ids])):
            raise ConfigError(f"{checkpoint.path}: has {architecture.vocab_size} tokens, {name} would be {ids}; give "
                              "its own tokenizer as --tokenizer-model")
    return token_ids


def _architecture(config: dict[str, Any]) -> Architecture:
    for name, value in {**FIXED, **OPTIONAL}.items():
        if (found := config.get(name, value if name != "model_type" else None)) != value:
            raise ConfigError(f"{name}: {found!r} is not the HRM that is built here ({value!r})")
    if not isinstance(prefix_lm := config.get(PREFIX, True), bool):
        raise ConfigError(f"{PREFIX}: {prefix_lm!r} is neither true nor false")
    # "rope_scaling" is the older name and takes precedence in transformers, which also accepts the older "type".
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if (rope_type := rope.get("rope_type", rope.get("type", "default"))) != "default":
        raise ConfigError(f"rope_type: {rope_type!r} is not built here ('default')")
    depth = "num_layers_per_stack" if config.get("num_layers_per_stack") else "num_hidden_layers"
    sizes = {name: whole(name, config[name]) for name in (
        depth, "hidden_size", "num_attention_heads", "intermediate_size", "vocab_size", "H_cycles", "L_cycles")}
    h, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    scale = number("embedding_scale", config.get("embedding_scale") or 1 / number(
        "initializer_range", config["initializer_range"]))
    # transformers stores only the scale, from which the standard deviation of the initial weights follows.
    lecun = scale == Architecture(1, h, heads, 1, 1).embedding_scale
    architecture = Architecture(
        num_layers=sizes[depth], hidden_size=h, num_attention_heads=heads,
        ffn_hidden_size=sizes["intermediate_size"], vocab_size=sizes["vocab_size"], h_cycles=sizes["H_cycles"],
        l_cycles=sizes["L_cycles"],
        init_scheme="lecun_normal" if lecun else "fixed_normal", init_std=None if lecun else 1 / scale,
        rope_theta=number("rope_theta", rope.get("rope_theta", config.get("rope_theta", 10_000.0))),
        norm_epsilon=number("rms_norm_eps", config["rms_norm_eps"]), attention_mask=PREFIX_LM if prefix_lm else CAUSAL)
    if (head_dim := whole("head_dim", config.get("head_dim", 128))) != architecture.head_dim:
        raise ConfigError(f"head_dim: {head_dim} is not hidden_size / num_attention_heads = {architecture.head_dim}")
    if architecture.padded_vocab_size != architecture.vocab_size:
        raise ConfigError(f"vocab_size: {architecture.vocab_size} is no multiple of 256, as HRM-Text pads it")
    return architecture


def read_hf(folder: str | Path, verify: bool = True) -> Checkpoint:
    """Open a transformers folder as a model before its first step.

    Tensors are read on request, and verified, as the settings are, if the folder is an export of these tools; quantized
    ones are dequantized.
    """
    folder = Path(folder)
    if verify:
        check_settings(folder)
    config, noted = read_json(folder / HF_CONFIG_FILE), setting_of(folder, "bp_max_steps", verify)
    try:
        architecture = _architecture(config)
        quantization = Quantization.of_config(config)
        training = Training(seq_length=whole("max_position_embeddings", config["max_position_embeddings"]),
                            bp_max_steps=bp_steps_of(config, architecture.h_cycles, noted))
    except ConfigError as error:
        raise ConfigError(f"{folder / HF_CONFIG_FILE}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ConfigError(f"{folder / HF_CONFIG_FILE}: lacks a setting or has an odd one ({error}); copy the "
                          "folder again") from error
    generation = _generation_config(folder)
    token_ids = _ids_of({folder / HF_CONFIG_FILE: config, folder / GENERATION_FILE: generation})
    architecture = replace(architecture, vocab_size=_tokens_of(generation, architecture.vocab_size))
    counts_tokens = setting_of(folder, TOKENS_KNOWN, verify) is True and setting_of(
        folder, "vocab_size", verify) == architecture.vocab_size  # not if the suppressed rows have been removed
    entries = table(architecture)
    if quantization is None:
        files = HFFiles(folder, entries, verify)
    else:
        quantization.check(entries)
        files = HFFiles(folder, [stored for entry in entries for stored in quantization.stored(entry)], verify,
                        (*FLOATS, *LOW_BIT))

    def read(part: str, entry: Rename) -> torch.Tensor:
        tensor = quantization.read(entry, files.tensor) if quantization else files.tensor(entry)
        return entry.to_megatron(tensor.float() if entry.trained else as_start(f"{folder}: {entry.hf}", tensor))

    return Checkpoint(folder, architecture, training, 0, 0, frozenset({RAW}), read, token_ids,
                      UNVERIFIED if not verify else "" if files.has_digests else WITHOUT_CHECKSUMS,
                      vocabulary_beside(folder), origin_of(folder, verify) or Origin(None, 0),
                      counts_tokens=counts_tokens)


def _generation_config(folder: Path) -> dict[str, Any]:
    path = folder / GENERATION_FILE
    return read_json(path) if path.exists() else {}


def left_out(checkpoint: Checkpoint) -> str:
    """Name the generation settings of an hf folder that its exports do not keep, as the end of a sentence."""
    generation, rows = _generation_config(checkpoint.path), checkpoint.architecture.padded_vocab_size
    kept = {*TOKEN_IDS, "transformers_version", *([SUPPRESSED] if _tokens_of(generation, rows) < rows else [])}
    names = sorted(name for name, value in generation.items()
                   if value not in (None, []) and name not in kept and not name.startswith("_"))
    return f"; {', '.join(names)} of its {GENERATION_FILE} left out" if names else ""


def _tokens_of(generation: Mapping[str, Any], rows: int) -> int:
    """Return the number of tokens, which no config holds: exports suppress the rows that stand for none."""
    suppressed = generation.get(SUPPRESSED)
    tokens = rows - len(suppressed) if isinstance(suppressed, list) else rows
    return tokens if suppressed == [*range(tokens, rows)] and padded_vocab_size(tokens) == rows else rows


def _ids_of(configs: Mapping[Path, Mapping[str, Any]]) -> dict[str, TokenIds]:
    """Return the token ids of the configs, where later configs take precedence; empty if they name no eos. Without a
    pad token eos is used, as when transformers generates."""
    ids = {}
    for path, config in configs.items():
        for name in TOKEN_IDS:
            if (value := config.get(name)) is None:
                continue
            if not all(isinstance(i, int) for i in (value if isinstance(value, list) else [value])) or value == []:
                raise ConfigError(f"{path}: {name}: {value!r} is no token id")
            ids[name] = value
    end = ids.get("eos_token_id")
    return {"pad_token_id": end[0] if isinstance(end, list) else end, **ids} if end is not None else {}
