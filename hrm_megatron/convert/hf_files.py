"""The safetensors files of a transformers folder: which file holds a tensor, whole or split by modules."""
from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from hrm_megatron.checkpoint.archive import DamagedError
from hrm_megatron.config import ConfigError
from hrm_megatron.convert.ledger import EXPORT_FILE, digests_of, tensor_digest
from hrm_megatron.convert.table import Rename, check

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
SHARDS = "model-*-of-*.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
FLOATS = ("F32", "BF16", "F16")  # safetensors' dtype names
LOW_BIT = ("I8", "U8", "I32", "I64")
# Fused tensor -> transformers' modules that hold its row blocks, as save_pretrained(save_original_format=False) writes
# them; transformers 5.24, conversion_mapping.py, "hrm_text".
MODULES = {
    ".attn.gqkv_proj.": tuple(f".self_attn.{name}_proj." for name in ("gate", "q", "k", "v")),
    ".attn.o_proj.": (".self_attn.o_proj.",),
    ".mlp.gate_up_proj.": (".mlp.gate_proj.", ".mlp.up_proj."),
}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of settings; ConfigError if the file holds anything else."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read ({error.strerror}); give a folder that transformers saved") from error
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error}); copy the folder again") from error
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: holds no settings; copy the folder again")
    return loaded


def parts_of(name: str) -> list[str]:
    """Return the names of a tensor's parts in transformers' modules, in the order of their rows."""
    return [name.replace(fused, part) for fused, parts in MODULES.items() if fused in name for part in parts]


class HFFiles:
    """Tensors of a folder by entries of the table, each read on request.

    Exactly the tensors of the table must be present. With `verify`, they are compared with the checksums of the
    folder's conversion.json, if it has one (`has_digests`).
    """

    def __init__(self, folder: Path, entries: Iterable[Rename], verify: bool = True,
                 types: Sequence[str] = FLOATS) -> None:
        self.folder, entries = folder, list(entries)
        self.digests = digests_of(folder) if verify else {}
        self.file_of: dict[str, Path] = {}
        shapes: dict[str, tuple[int, ...]] = {}
        named = self._index()
        for path in sorted({folder / WEIGHTS_FILE} if named is None else set(named.values())):
            with _open(path) as opened:
                for name in opened.keys():  # noqa: SIM118  # not a dict
                    if name in self.file_of:
                        raise ConfigError(f"{path}: holds {name}, which {self.file_of[name]} holds too; copy the "
                                          "folder again")
                    self.file_of[name], shapes[name] = path, tuple(opened.get_slice(name).get_shape())
                    if (dtype := opened.get_slice(name).get_dtype()) not in types:
                        raise ConfigError(f"{path}: {name} is of type {dtype}, no weight's; copy the folder again")
        for name, path in (named or {}).items():
            if self.file_of.get(name) != path:
                raise ConfigError(f"{folder / INDEX_FILE}: {name} is not in {path.name}, where it should be; copy the "
                                  "folder again")
        self.names = {entry.hf: self._stored_as(entry) for entry in entries}
        stored = [dataclasses.replace(entry, hf=name, shape=(entry.shape[0] // len(names), *entry.shape[1:]))
                  for entry in entries for names in [self.names[entry.hf]] for name in names]
        check(folder, "hf", stored, shapes)

    @property
    def has_digests(self) -> bool:
        return self.digests.keys() >= self.file_of.keys()

    def tensor(self, entry: Rename) -> torch.Tensor:
        """Read one tensor, concatenated from its parts if it is stored in parts."""
        parts = [self._read(name) for name in self.names[entry.hf]]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def _read(self, name: str) -> torch.Tensor:
        path = self.file_of[name]
        with _open(path) as opened:
            tensor: torch.Tensor = opened.get_tensor(name)
        if name in self.digests and tensor_digest(tensor) != self.digests[name]:
            raise DamagedError(f"{path}: {name} is not what was exported ({EXPORT_FILE} says otherwise); copy the "
                               f"folder again, or remove {EXPORT_FILE} if the weights were changed on purpose")
        return tensor

    def _stored_as(self, entry: Rename) -> list[str]:
        parts = parts_of(entry.hf)
        in_parts = entry.hf not in self.file_of and any(part in self.file_of for part in parts)
        return parts if in_parts else [entry.hf]

    def _index(self) -> dict[str, Path] | None:
        """Read which file of this folder each tensor should be in; None if there is a single file."""
        place = self.folder / INDEX_FILE
        if (self.folder / WEIGHTS_FILE).exists():  # transformers prefers it to an index
            return None
        if not place.exists():
            pickled = [path.name for pattern in PICKLES for path in sorted(self.folder.glob(pattern))]
            if pickled:
                raise ConfigError(f"{self.folder / pickled[0]}: a pickle, which can run code when it is read, and no "
                                  f"{WEIGHTS_FILE} beside it; let whoever made it save it as safetensors")
            if shards := sorted(self.folder.glob(SHARDS)):
                raise ConfigError(f"{place}: missing beside {shards[0].name}; copy the folder again")
            return None
        weight_map = read_json(place).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise ConfigError(f"{place}: does not say which file a tensor is in; copy the folder again")
        for name, file in weight_map.items():
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise ConfigError(f"{place}: says that {name} is in {file!r}; only safetensors of the folder itself "
                                  "are read")
        return {name: self.folder / file for name, file in weight_map.items()}


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path}: cannot read ({error}); copy the folder again") from error
