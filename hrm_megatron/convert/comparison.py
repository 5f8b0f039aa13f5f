"""Check that a converted checkpoint computes the same logits as its source, loaded by the code that will use it."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from megatron.core import dist_checkpointing
from safetensors import safe_open
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from hrm_megatron.checkpoint.folders import find_iteration
from hrm_megatron.config import Architecture, ConfigError
from hrm_megatron.convert.checkpoint import RAW, Checkpoint
from hrm_megatron.convert.engine_names import check_names
from hrm_megatron.convert.gguf_file import rounding
from hrm_megatron.convert.hf import HF_CONFIG_FILE
from hrm_megatron.convert.hf_files import read_json
from hrm_megatron.convert.native import PART_NAMES, model_key, read_native, state_key
from hrm_megatron.convert.quantization import Quantization
from hrm_megatron.convert.table import table
from hrm_megatron.convert.to_megatron import stock_state
from hrm_megatron.data.batch import PackedBatch, TokenIds, assemble_row
from hrm_megatron.model.hrm import HRMModel
from hrm_megatron.parallel.single import single_rank
from hrm_megatron.transformer_config import hrm_config, swiglu_settings

LENGTHS = ((5, 4), (1, 9), (12, 2), (3, 1))  # (prefix, target) of the compared examples
# Relative to the norm of all logits. An fp32 dot product of thousands of terms has an error of some 1e-6, which tens of
# normalized layers do not raise beyond 1e-4; a swapped block, gate or head gives some 0.1 to 1.
TOLERANCE = 1e-3
DEQUANTIZED = "dequantized"  # a format of `Loaded`: the weights that a quantization decided on, before they are stored


@dataclass(frozen=True)
class Loaded:
    """A folder, its format, and which of its weights to run, rounded to `dtype` (of --dtype) and computed in fp32."""

    folder: Path
    format: str
    checkpoint: Checkpoint | None = None  # if it has already been opened
    kind: str = RAW
    dtype: str = "float32"

    @property
    def compared(self) -> str:
        """What a report calls logits that equal this folder's."""
        if self.format == DEQUANTIZED:
            return "those of its dequantized weights"
        return "the source's" if self.dtype == "float32" else f"those of the source rounded to {self.dtype}"


def compare(source: Loaded, target: Loaded, architecture: Architecture, max_tokens: int) -> str:
    """Compare the logits of two folders on PrefixLM rows, with one model in memory at a time; refuse a difference.

    Returns a clause that reports the result.
    """
    check_keys(target, architecture)
    rows = examples(architecture, max_tokens)
    expected = logits_of(source, architecture, rows).double()
    if not expected.isfinite().all():
        return "its logits were not compared with the source's, which are NaN or infinite"
    difference = float((logits_of(target, architecture, rows) - expected).norm() / expected.norm())
    if not difference <= TOLERANCE:  # NaN too
        raise ConfigError(f"{target.folder}: computes other logits than {source.folder} on {len(rows)} PrefixLM rows "
                          f"({difference:.1e} of their norm, at most {TOLERANCE:.0e}); nothing was left there: "
                          "please report it, or pass --no-verify to keep it as it is")
    return f"its logits are {source.compared} within {difference:.1e} of their norm on {len(rows)} PrefixLM rows"


def examples(architecture: Architecture, max_tokens: int) -> list[tuple[TokenIds, TokenIds]]:
    """Return a few random (prefix, target) pairs within vocabulary and context of the model."""
    rng = np.random.default_rng(0)
    return [(rng.integers(0, architecture.vocab_size, prefix), rng.integers(0, architecture.vocab_size, target))
            for prefix, target in LENGTHS if prefix + target <= max(max_tokens, 4)]


def check_keys(target: Loaded, architecture: Architecture) -> None:
    """Refuse names, shapes and dtypes that the loading code of the target would not find."""
    if target.format == "hf":
        names: set[str] = set()
        for path in target.folder.glob("*.safetensors"):
            with safe_open(path, framework="pt") as opened:
                names |= set(opened.keys())
        check_names(target.folder, names, architecture.num_layers)
    if target.format == "native":
        [folder] = target.folder.glob("fsdp2_epoch_*")
        stored = {key: (tuple(entry.size), entry.properties.dtype) for key, entry
                  in FileSystemReader(folder).read_metadata().state_dict_metadata.items()
                  if isinstance(entry, TensorStorageMetadata)}
        if wrong := stored.items() ^ native_tensors(architecture).items():
            raise ConfigError(f"{folder}: {min(wrong)[0]} is not there as HRM-Text keeps it; please report it")


def native_tensors(architecture: Architecture) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of every tensor of HRM-Text's checkpoint, by key."""
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"optim.param_groups.0.lr": ((), torch.float32)}
    for entry in table(architecture):
        tensors[model_key(entry)] = entry.foreign_shape, torch.float32 if entry.trained else torch.bfloat16
        if entry.trained:
            tensors[state_key(entry, "step")] = (), torch.float32
            tensors |= {state_key(entry, name): (entry.foreign_shape, torch.float32) for name in PART_NAMES.values()}
    return tensors


@torch.no_grad()
def logits_of(loaded: Loaded, architecture: Architecture, rows: list[tuple[TokenIds, TokenIds]]) -> torch.Tensor:
    """Return logits [positions of all rows, v] in fp32 on the CPU, without head rows that stand for no token."""
    by_transformers = loaded.format == "hf" and loaded.checkpoint is None
    logits = _of_transformers(loaded, rows) if by_transformers else _of_ours(loaded, architecture, rows)
    return logits[:, :architecture.vocab_size].float()


def _of_transformers(loaded: Loaded, rows: list[tuple[TokenIds, TokenIds]]) -> torch.Tensor:
    from transformers import HrmTextForCausalLM  # imported late: takes seconds
    from transformers.utils import logging

    logging.disable_progress_bar()
    quantization = quantization_of(loaded.folder)
    # compressed-tensors dequantizes 4-bit floats to bf16 at the first call, whatever the dtype of the model.
    in_bfloat16 = quantization is not None and quantization.linear.is_float
    try:
        model, info = HrmTextForCausalLM.from_pretrained(
            loaded.folder, dtype=torch.bfloat16 if in_bfloat16 else torch.float32, output_loading_info=True)
    except StrictDataclassError as error:
        raise ConfigError(f"{loaded.folder / HF_CONFIG_FILE}: transformers refuses it ({' '.join(str(error).split())});"
                          " correct it, or pass --no-verify") from error
    if lost := [name for names in info.values() for name in names]:
        raise ConfigError(f"{loaded.folder}: transformers does not load {lost[0]}; please report it")
    if in_bfloat16:
        model(torch.tensor([[0]]))
        torch.nn.Module.float(model)  # the model's own float() refuses quantized models, which it no longer is
    _round(model, loaded.dtype)
    logits = []
    for prefix, target in rows:
        tokens = torch.tensor([[*prefix, *target[:-1]]])
        types = torch.tensor([[1] * len(prefix) + [0] * (len(target) - 1)])
        logits.append(model.eval()(tokens, **({"token_type_ids": types} if model.config.prefix_lm else {})).logits[0])
    return torch.cat(logits)


def quantization_of(folder: Path) -> Quantization | None:
    """Return the quantization of a transformers folder; None: it is not quantized."""
    return Quantization.of_config(read_json(folder / HF_CONFIG_FILE))


def _of_ours(loaded: Loaded, architecture: Architecture, rows: list[tuple[TokenIds, TokenIds]]) -> torch.Tensor:
    as_megatron = loaded.checkpoint is None and loaded.format == "megatron"
    checkpoint = loaded.checkpoint or (None if as_megatron else read_native(loaded.folder))
    with single_rank():
        # HRM-Text's models have a gate even if the converted one has none. On the CPU, like transformers' model: a GPU
        # can be full, and can multiply fp32 in TF32.
        config = hrm_config(checkpoint.architecture if checkpoint else architecture, use_cpu_initialization=True,
                            **swiglu_settings(own=True))
        model = HRMModel(config, seed=0).eval()
        if checkpoint is None:
            _load_as_megatron(model, loaded.folder)
        else:
            places = {**dict(model.named_parameters()), **dict(model.named_buffers())}
            for entry in table(checkpoint.architecture):
                places[entry.megatron].copy_(checkpoint.part_of(loaded.kind, entry))
        _round(model, loaded.dtype)
        positions = sum(len(prefix) + len(target) - 1 for prefix, target in rows)
        row = {name: tensor[None] for name, tensor in assemble_row(
            rows, positions, causal=architecture.causal).items()}
        logits: torch.Tensor = model.logits_at(model.states(PackedBatch.from_rows(row)), torch.arange(positions))
        return logits


def _load_as_megatron(model: HRMModel, folder: Path) -> None:
    stored = dist_checkpointing.load(stock_state(model), str(find_iteration(folder)))
    model.load_state_dict({name: value for name, value in stored.items() if isinstance(value, torch.Tensor)},
                          strict=False)  # not strict: stock layers store more than tensors


def _round(model: torch.nn.Module, dtype: str) -> None:
    rounded = rounding(dtype)
    for weight in model.parameters():
        if weight.dim() > 1 and weight.is_floating_point():  # neither the initial z_L nor codes
            weight.copy_(rounded(weight))
