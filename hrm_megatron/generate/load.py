"""Open a checkpoint of any format for generation, and check its tokenizer."""
from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hrm_megatron.checkpoint.folders import complete_iterations, find_iteration
from hrm_megatron.checkpoint.manifest import TRACKER_FILE
from hrm_megatron.checkpoint.verify import naming_another
from hrm_megatron.config import ConfigError
from hrm_megatron.convert.checkpoint import EMA, Checkpoint
from hrm_megatron.convert.hf import HF_CONFIG_FILE, read_hf
from hrm_megatron.convert.hf_tokenizer import check_vocabulary
from hrm_megatron.convert.ledger import EXPORT_FILE
from hrm_megatron.convert.megatron import read_megatron
from hrm_megatron.convert.native import NATIVE_CONFIG_FILE, read_native
from hrm_megatron.data.tokenizer import TOKENIZER_FILE, TextTokenizer

if TYPE_CHECKING:
    from hrm_megatron.model.hrm import HRMModel

FINGERPRINT_VALUES = 1024  # per tensor


@torch.no_grad()
def load_model(checkpoint: Checkpoint, kind: str = EMA) -> HRMModel:
    """Return the HRMModel of `checkpoint` in fp32 with its weights of this kind ("ema" or "raw")."""
    from hrm_megatron.model.hrm import HRMModel
    from hrm_megatron.transformer_config import hrm_config

    model = HRMModel(hrm_config(checkpoint.architecture), seed=0)
    places = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with naming_another(checkpoint.path):
        for name, tensor in checkpoint.weights(kind):
            places.pop(name).copy_(tensor)
    assert not places, f"weights that the checkpoint does not name: {sorted(places)}"
    return model.eval()


def open_checkpoint(load: str | Path, step: int | None = None, verify: bool = True) -> Checkpoint:
    """Open the latest checkpoint (or that of `step`) under the folder that `--save` named."""
    iteration = find_iteration(load, step)
    with naming_another(iteration):
        return read_megatron(iteration, verify)


@contextlib.contextmanager
def opened(load: Path, step: int | None = None, verify: bool = True) -> Iterator[Checkpoint]:
    """Open a folder of Megatron, transformers or HRM-Text; its files tell the format.

    Errors about damage found while the block reads tensors name the latest complete iteration.
    """
    formats = [name for name, file in (("transformers", HF_CONFIG_FILE), ("HRM-Text", NATIVE_CONFIG_FILE),
                                       ("Megatron", TRACKER_FILE)) if (load / file).exists()]
    if len(formats) > 1:
        raise ConfigError(f"--load {load}: holds models of {' and '.join(formats)}; give an iteration in it, or move "
                          "one of them to a folder of its own")
    if (load / HF_CONFIG_FILE).exists():
        if step is not None:
            raise ConfigError(f"--ckpt-step {step}: a transformers folder has no steps; leave the flag out")
        if not verify and not (load / EXPORT_FILE).exists():
            raise ConfigError(f"--no-verify-checkpoint: {load} has no checksums to skip ({EXPORT_FILE}); leave the "
                              "flag out")
        yield read_hf(load, verify)
    elif (load / NATIVE_CONFIG_FILE).exists():
        yield read_native(load, step, verify)
    elif any(load.glob("*.gguf")):
        raise ConfigError(f"--load {load}: GGUF, which llama.cpp reads; give the checkpoint that it was made of")
    else:
        _refuse_without_settings(load)
        iteration = find_iteration(load, step)
        with naming_another(iteration):
            yield read_megatron(iteration, verify)


def _refuse_without_settings(load: Path) -> None:
    """Name the file that would tell the format of a folder that holds weights of transformers or HRM-Text alone."""
    if (load / TRACKER_FILE).exists() or complete_iterations(load):
        return
    for pattern, settings in (("*.safetensors", HF_CONFIG_FILE), ("fsdp2_epoch_*", NATIVE_CONFIG_FILE)):
        if weights := min(load.glob(pattern), default=None):
            raise ConfigError(f"{load / settings}: missing beside {weights.name}; copy the folder again")


def weights_kind(checkpoint: Checkpoint, asked: str | None) -> str:
    """Return the kind of weights: `asked` if given, else the EMA if there is one."""
    checkpoint.check_asked(asked)
    kind = asked or checkpoint.default_kind()
    checkpoint.require(kind)
    return kind


class Fingerprint:
    """Distinguishes models of one architecture by the first values of each tensor, which every training step changes.
    File checksums would not do: they differ between formats and shards, and foreign folders have none."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def taking(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the same tensors while adding them to the fingerprint."""
        for name, tensor in tensors:
            self._digest.update(name.encode())
            self._digest.update(tensor.detach().flatten()[:FINGERPRINT_VALUES].float().cpu().numpy().tobytes())
            yield name, tensor

    def __str__(self) -> str:
        return self._digest.hexdigest()[:16]


def open_tokenizer(path: Path | None, load: Path) -> TextTokenizer:
    """Open the tokenizer at `path`, or the one beside the model if `path` is None."""
    beside = load / TOKENIZER_FILE
    if not load.is_dir():
        raise ConfigError(f"--load {load}: no folder there; give one that --save named, or of a model")
    if path is None:
        if not beside.exists():
            raise ConfigError(f"{load}: no {TOKENIZER_FILE} in it; give the tokenizer of the training data as "
                              "--tokenizer-model")
        return TextTokenizer(load)
    return TextTokenizer(path)


def check_tokenizer(tokenizer: TextTokenizer, checkpoint: Checkpoint) -> None:
    """Refuse a tokenizer whose ids differ from the model's, as far as the checkpoint records them."""
    if not checkpoint.takes(tokenizer.vocab_size):
        raise ConfigError(f"{tokenizer.path}: {tokenizer.vocab_size} entries, the checkpoint has "
                          f"{checkpoint.architecture.vocab_size}; give the tokenizer of its training data")
    check_vocabulary(tokenizer, checkpoint)
