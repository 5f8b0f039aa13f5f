"""The GGUF file that llama.cpp loads: settings, tokenizer, and tensors in fp32, bf16 or blocks of 8 bits (Q8_0)."""
from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from hrm_megatron.config import Architecture, ConfigError
from hrm_megatron.convert.card import CARD_FILE, NO_SECTIONS, Sections, gguf_card
from hrm_megatron.convert.casts import rounded
from hrm_megatron.convert.checkpoint import EMA, Checkpoint
from hrm_megatron.convert.gguf_names import (
    ARCHITECTURE,
    GENERATIONS,
    NESTED,
    complaints,
    expected_keys,
    expected_tensors,
    names_of,
    refuse,
)
from hrm_megatron.convert.gguf_tokenizer import write_tokenizer
from hrm_megatron.convert.hf import num_tokens, refuse_others, token_ids_of
from hrm_megatron.convert.hf_tokenizer import ExportTokenizer
from hrm_megatron.convert.ledger import Ledger
from hrm_megatron.convert.table import Rename, table

if TYPE_CHECKING:
    import gguf

GGUF_FILE = "model.gguf"
Q8_0 = "q8_0"
KINDS = {"float32": ("F32", "ALL_F32"), "bfloat16": ("BF16", "MOSTLY_BF16"), Q8_0: ("Q8_0", "MOSTLY_Q8_0")}
BLOCK, BLOCK_BYTES = 32, 34  # weights that share a scale in Q8_0, and the bytes of a block with its scale
BYTES_OF_WEIGHT = {"float32": 4.0, "bfloat16": 2.0, Q8_0: BLOCK_BYTES / BLOCK}
LARGEST = 127 * float(np.finfo(np.float16).max)  # the scale of a block is fp16


def library() -> ModuleType:
    """Import gguf; if it is not installed, say how to get it."""
    try:
        import gguf
    except ModuleNotFoundError as error:
        if error.name != "gguf":
            raise
        raise ConfigError("--save-format gguf needs gguf, which is not installed; pip install 'hrm-megatron[gguf]'"
                          ) from error
    logging.getLogger("gguf").setLevel(logging.WARNING)  # it logs what it is about to do
    return gguf


def write_gguf(checkpoint: Checkpoint, folder: Path, kind: str = EMA, dtype: str = "float32",
               tokenizer: str | Path | None = None, keys: str = NESTED, ledger: Ledger | None = None,
               sections: Sections = NO_SECTIONS) -> None:
    """Write the weights of this kind for llama.cpp, with keys of generation `keys` and, if given, the tokenizer.

    One tensor is in memory at a time; `ledger` records them under their names in the file.
    """
    library()
    from gguf import GGUFWriter

    ledger = ledger or Ledger()
    checkpoint.require(kind)
    refuse_others(checkpoint, "llama.cpp")
    architecture, max_tokens = checkpoint.architecture, checkpoint.training.seq_length
    if dtype == Q8_0 and (architecture.hidden_size % BLOCK or architecture.ffn_hidden_size % BLOCK):
        raise ConfigError(f"--dtype {Q8_0}: takes rows of multiples of {BLOCK} weights, and {checkpoint.path} has "
                          f"hidden size {architecture.hidden_size} and FFN {architecture.ffn_hidden_size}; choose "
                          "bfloat16")
    beside = None if tokenizer is None else ExportTokenizer.open(tokenizer)
    token_ids = token_ids_of(checkpoint, beside)
    folder.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(folder / GGUF_FILE, ARCHITECTURE)
    try:
        _write_settings(writer, architecture, max_tokens, dtype, keys)
        if beside:
            write_tokenizer(writer, beside, architecture.padded_vocab_size)
        else:
            writer.add_tokenizer_model("none")
        _write_tensors(writer, checkpoint, kind, dtype, ledger)
    finally:
        writer.close()
    end = token_ids.get("eos_token_id", 0)
    card = gguf_card(checkpoint, dtype, num_tokens(architecture, beside), end[0] if isinstance(end, list) else end,
                     beside.text.spelling if beside else None, sections)
    (folder / CARD_FILE).write_text(card, encoding="utf-8")


def _write_settings(writer: gguf.GGUFWriter, architecture: Architecture, max_tokens: int, dtype: str, keys: str
                    ) -> None:
    from gguf import GGML_QUANT_VERSION, LlamaFileType

    writer.add_type("model")
    writer.add_file_type(getattr(LlamaFileType, KINDS[dtype][1]))
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_context_length(max_tokens)
    writer.add_embedding_length(architecture.hidden_size)
    writer.add_feed_forward_length(architecture.ffn_hidden_size)
    # llama.cpp counts layers of the KV cache: each layer has its own keys and values at every tick.
    writer.add_block_count(architecture.num_layers * architecture.h_cycles * (architecture.l_cycles + 1))
    writer.add_vocab_size(architecture.padded_vocab_size)
    writer.add_embedding_scale(architecture.embedding_scale)
    writer.add_head_count(architecture.num_attention_heads)
    writer.add_head_count_kv(architecture.num_attention_heads)
    writer.add_key_length(architecture.head_dim)
    writer.add_value_length(architecture.head_dim)
    writer.add_layer_norm_rms_eps(architecture.norm_epsilon)
    writer.add_rope_dimension_count(architecture.head_dim)
    writer.add_rope_freq_base(architecture.rope_theta)
    recurrence = f"{ARCHITECTURE}.{GENERATIONS[keys]}"  # the gguf library has no methods for these keys
    writer.add_uint32(f"{recurrence}layers_per_stack", architecture.num_layers)
    writer.add_uint32(f"{recurrence}h_cycles", architecture.h_cycles)
    writer.add_uint32(f"{recurrence}l_cycles", architecture.l_cycles)
    writer.add_bool(f"{recurrence}prefix_lm", not architecture.causal)


class _Bytes(np.ndarray):
    """An array that is written by the file object's own `write`: numpy's tofile loses the errno of a failure."""

    def tofile(self, fid: Any, sep: str = "", format: str = "%s") -> None:
        fid.write(self)


def _write_tensors(writer: gguf.GGUFWriter, checkpoint: Checkpoint, kind: str, dtype: str, ledger: Ledger) -> None:
    from gguf import GGMLQuantizationType

    architecture = checkpoint.architecture
    shapes = expected_tensors(architecture)
    parts = [(entry, names_of(entry.hf, architecture.num_layers)) for entry in table(architecture)]
    for entry, names in parts:
        stored_as = _stored_as(entry, dtype)
        for name in names:
            size_bytes = round(math.prod(shapes[name]) * BYTES_OF_WEIGHT[stored_as])
            writer.add_tensor_info(name, shapes[name], np.dtype(np.float32), size_bytes,
                                   GGMLQuantizationType[KINDS[stored_as][0]])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()

    def write(entry: Rename, names: tuple[str, ...]) -> None:  # frees one tensor before the next is read
        whole, stored_as = entry.from_megatron(checkpoint.part_of(kind, entry)).float(), _stored_as(entry, dtype)
        for name, part in zip(names, whole.chunk(len(names)), strict=True):
            stored = as_stored(name, part.contiguous(), stored_as)
            ledger.note(name, part, stored, stored_as)
            writer.write_tensor_data(stored.numpy().view(_Bytes))

    for entry, names in parts:
        write(entry, names)


def _stored_as(entry: Rename, dtype: str) -> str:
    """Return the type to store; the initial z_L stays fp32, because llama.cpp adds it to states only in fp32."""
    return dtype if entry.trained else "float32"


def as_stored(name: str, tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    """Round an fp32 tensor as GGUF stores it: uint8 [rows, bytes of a row], or fp32 unchanged."""
    if dtype == "float32":
        return tensor
    if dtype != Q8_0:
        return rounded(name, tensor, torch.bfloat16).view(torch.uint8)
    from gguf import GGMLQuantizationType, quantize

    if not (largest := float(tensor.abs().max())) <= LARGEST:  # NaN too
        raise ConfigError(f"{name}: holds {largest:.3g}, which --dtype {Q8_0} cannot; choose bfloat16")
    return torch.from_numpy(quantize(tensor.numpy(), GGMLQuantizationType.Q8_0))


def rounding(dtype: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function that rounds an fp32 matrix as a file with this --dtype does."""
    if dtype != Q8_0:
        return lambda tensor: tensor.to(getattr(torch, dtype))
    from gguf import GGMLQuantizationType, dequantize

    return lambda tensor: torch.from_numpy(dequantize(as_stored("", tensor.cpu(), Q8_0).numpy(),
                                                      GGMLQuantizationType.Q8_0))


def read_back(folder: Path, source: Checkpoint) -> Checkpoint:
    """Open the file with the library's reader, as a checkpoint with the settings of its `source`."""
    library()
    from gguf import GGUFReader, dequantize

    tensors = {tensor.name: tensor for tensor in GGUFReader(folder / GGUF_FILE).tensors}

    def read(part: str, entry: Rename) -> torch.Tensor:
        found = [tensors[name] for name in names_of(entry.hf, source.architecture.num_layers)]
        whole = torch.cat([torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type))) for tensor in found])
        return entry.to_megatron(whole if entry.trained else whole.to(torch.bfloat16))

    return replace(source, path=folder, iteration=0, embedding_updates=0, parts=frozenset({"raw"}), read=read)


def check_gguf(folder: Path, architecture: Architecture, keys: str, with_tokenizer: bool) -> None:
    """Refuse a file with a key or tensor that llama.cpp would miss or not know."""
    library()
    from gguf import GGUFReader

    reader = GGUFReader(folder / GGUF_FILE)
    found = {name: field.types[0].name for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    suppressed = "tokenizer.ggml.suppress_tokens" in found  # absent if every row has a token
    refuse(folder / GGUF_FILE, complaints(found, expected_keys(keys, with_tokenizer, suppressed)))
    shapes = {tensor.name: tuple(int(n) for n in reversed(tensor.shape)) for tensor in reader.tensors}
    refuse(folder / GGUF_FILE, complaints(shapes, expected_tensors(architecture)))
