"""Which tensors of an export are quantized, as compressed-tensors reads it from config.json, and back."""
from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from hrm_megatron.checkpoint.stream import LazyTensor
from hrm_megatron.config import Architecture, ConfigError
from hrm_megatron.convert.hf_files import parts_of
from hrm_megatron.convert.low_bit import LowBit, Scheme, StoredTensor, from_stored, stored_tensors
from hrm_megatron.convert.table import Rename, is_embedding, table

CONFIG_KEY = "quantization_config"
METHOD, MIXED = "compressed-tensors", "mixed-precision"
STATUS, CODES = "quantization_status", "compressed"
# How compressed-tensors addresses the modules of transformers.
LAYERS, HEAD_TARGET, EMBEDDING = "Linear", "re:.*lm_head$", "Embedding"


@dataclass(frozen=True)
class Quantization:
    """The scheme of the matrices of the layers and the head, and that of the embedding, if it is quantized."""

    linear: Scheme
    embedding: Scheme | None = None

    def of(self, entry: Rename) -> Scheme | None:
        """Return the scheme of a tensor; None: it is stored as a float."""
        if is_embedding(entry):
            return self.embedding
        return self.linear if len(entry.shape) == 2 else None

    @property
    def spelled(self) -> str:
        """A short description."""
        groups = f" in groups of {self.linear.group_size}" if self.linear.group_size else " with a scale for each row"
        return f"{self.linear.name}{groups}" + (f", {self.embedding.name} embedding" if self.embedding else "")

    def check(self, entries: Iterable[Rename]) -> None:
        """Refuse matrices whose rows are not multiples of the group size, naming sizes that would fit."""
        for entry in entries:
            scheme = self.of(entry)
            if scheme and scheme.group_size and entry.shape[1] % scheme.group_size:
                fitting = [size for size in (32, 64, 128) if entry.shape[1] % size == 0]
                way_out = (f"choose --group-size from {fitting}" if fitting and not scheme.is_float
                           else "choose --scheme int8, which has no groups")
                raise ConfigError(f"{entry.hf}: rows of {entry.shape[1]} weights are no multiple of the group size "
                                  f"{scheme.group_size}; {way_out}")

    def config(self) -> dict[str, Any]:
        """Return the value of CONFIG_KEY in config.json."""
        def group(target: str, scheme: Scheme) -> dict[str, Any]:
            return dict(targets=[target], format=scheme.format, weights=scheme.arguments())

        groups = [group(LAYERS, self.linear), group(HEAD_TARGET, self.linear)]
        if self.embedding:
            groups.append(group(EMBEDDING, self.embedding))
        formats = {each["format"] for each in groups}
        return dict(quant_method=METHOD, format=formats.pop() if len(formats) == 1 else MIXED,
                    **{STATUS: CODES}, ignore=[],
                    config_groups={f"group_{i}": each for i, each in enumerate(groups)})

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Quantization | None:
        """Read the settings of a folder; refuse any that these tools do not write. None: not quantized."""
        given = _without_nulls(config.get(CONFIG_KEY))
        if given is None:
            return None
        for scheme in (Scheme(name, size) for name, sizes in (("int4", (32, 64, 128)), ("int8", (0,)), ("mxfp4", (32,)))
                       for size in sizes):
            for embedding in (None, Scheme("int8", 0)):
                if (found := cls(scheme, embedding)).config() == given:
                    return found
        said = given if isinstance(given, Mapping) else {"quant_method": given}
        if said.get("quant_method") == METHOD and (status := said.get(STATUS, CODES)) != CODES:
            raise ConfigError(f"{CONFIG_KEY}: {STATUS}: {status!r} is what transformers saves again, without the "
                              "codes; give the folder that it had loaded")
        raise ConfigError(f"{CONFIG_KEY}: {said.get('quant_method')!r} of a kind that tools/quantize_checkpoint.py "
                          "does not write; give the model that it was made from")

    def stored(self, entry: Rename) -> list[Rename]:
        """Return the tensors of a file that represent one entry of the table."""
        scheme = self.of(entry)
        if scheme is None:
            return [entry]
        return [dataclasses.replace(entry, hf=entry.hf + tensor.suffix, shape=tensor.shape)
                for tensor in stored_tensors(scheme, entry.shape, _modules(entry))]

    def read(self, entry: Rename, read: Callable[[Rename], torch.Tensor]) -> torch.Tensor:
        """Read one tensor of the table, dequantized."""
        scheme = self.of(entry)
        if scheme is None:
            return read(entry)
        found: dict[str, torch.Tensor] = {}
        for name, stored in zip(self.stored(entry), stored_tensors(scheme, entry.shape, _modules(entry)), strict=True):
            found[stored.suffix] = tensor = read(name)
            if tensor.dtype != stored.dtype:
                raise ConfigError(f"{name.hf}: is {tensor.dtype}, not the {stored.dtype} of {scheme.name}; copy the "
                                  "folder again")
        return from_stored(scheme, entry.shape, found).dequantized()

    def size_bytes(self, architecture: Architecture, float_bytes: int = 2) -> int:
        """Return the bytes of all tensors in the files, with floats of `float_bytes` each."""
        total = 0
        for entry in table(architecture):
            scheme = self.of(entry)
            total += math.prod(entry.shape) * float_bytes if scheme is None else sum(
                math.prod(stored.shape) * stored.dtype.itemsize
                for stored in stored_tensors(scheme, entry.shape, _modules(entry)))
        return total


@dataclass(frozen=True)
class Quantized:
    """What a writer needs of a quantized model; `matrix(entry, scheme)` may be called repeatedly."""

    quantization: Quantization
    matrix: Callable[[Rename, Scheme], LowBit]
    method: str  # as the model card states it

    def tensors(self, entry: Rename) -> dict[str, LazyTensor]:
        """Return the tensors of a file, by name, that represent one entry; empty if it is stored as a float."""
        scheme = self.quantization.of(entry)
        if scheme is None:
            return {}

        def lazy(stored: StoredTensor, scheme: Scheme) -> LazyTensor:
            return LazyTensor(stored.shape, stored.dtype, lambda: stored.make(self.matrix(entry, scheme)))
        return {entry.hf + stored.suffix: lazy(stored, scheme)
                for stored in stored_tensors(scheme, entry.shape, _modules(entry))}


def _without_nulls(settings: Any) -> Any:
    """Drop unset settings: transformers writes null for each of them."""
    if isinstance(settings, Mapping):
        return {name: _without_nulls(value) for name, value in settings.items() if value is not None}
    return settings


def _modules(entry: Rename) -> int:
    return max(1, len(parts_of(entry.hf)))
