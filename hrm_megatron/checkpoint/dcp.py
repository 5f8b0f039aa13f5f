"""Read a torch.distributed.checkpoint folder, HRM-Text's or Megatron's, without running anything that is in it.

torch's own reader unpickles `.metadata` freely, which can execute code. Here only the classes pass that such a
file needs, and the data itself is read with `weights_only`.
"""
from __future__ import annotations

import io
import math
import pickle
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex, TensorStorageMetadata

from hrm_megatron.config import ConfigError

METADATA_FILE = ".metadata"
ALLOWED: dict[tuple[str, str], Any] = {
    **{(metadata.__name__, cls.__name__): cls for cls in (
        metadata.Metadata, MetadataIndex, TensorStorageMetadata, BytesStorageMetadata, metadata.ChunkStorageMetadata,
        metadata.TensorProperties, metadata.StorageMeta, metadata._MEM_FORMAT_ENCODING)},
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,  # a look-up in a table
    ("torch", "Size"): torch.Size,
    ("collections", "OrderedDict"): dict,
    # The folder that the checkpoint was written to: a value that nothing here uses.
    **{(module, f"{pure}{system}Path"): PurePosixPath for module in ("pathlib", "pathlib._local")
       for pure in ("", "Pure") for system in ("", "Posix", "Windows")},
    **{("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)},
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return ALLOWED[module, name]
        except KeyError:
            raise ConfigError(f"refused {module}.{name}, which no checkpoint needs; do not use this file unless you "
                              "know who made it") from None


class DCPFolder:
    """Tensors and small objects of one folder, by key; a tensor is read when it is asked for."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        place = self.path / METADATA_FILE
        try:
            with place.open("rb") as file:
                loaded = _MetadataUnpickler(file).load()
            self._entries: dict[str, Any] = loaded.state_dict_metadata
            self._storage: dict[MetadataIndex, Any] = loaded.storage_data
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from None
        except OSError as error:
            raise ConfigError(f"{place}: cannot read ({error.strerror}); the folder is no torch.distributed "
                              "checkpoint, or its writing was cut off") from error
        except Exception as error:  # what pickle raises over damaged bytes is not bounded
            raise ConfigError(f"{place}: damaged ({error}); copy the checkpoint again") from error

    def keys(self) -> list[str]:
        return list(self._entries)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by key."""
        return {key: tuple(entry.size) for key, entry in self._entries.items()
                if isinstance(entry, TensorStorageMetadata)}

    def check_files(self) -> None:
        """Raise ConfigError unless every piece of every tensor lies in a file that is long enough."""
        for key, entry in self._entries.items():
            if isinstance(entry, TensorStorageMetadata) and sum(
                    math.prod(chunk.sizes) for chunk in entry.chunks) != math.prod(entry.size):
                raise ConfigError(f"{self.path}: {key}: its pieces are not the whole tensor of {list(entry.size)}; "
                                  "copy the checkpoint again, or choose another with --ckpt-step")
        ends: dict[str, int] = {}
        for info in self._storage.values():
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        for name, end in ends.items():
            place = self.path / name
            if (size := place.stat().st_size if place.is_file() else 0) < end:
                raise ConfigError(f"{place}: {size} bytes are there, {METADATA_FILE} promises {end}; copy the "
                                  "checkpoint again, or choose another with --ckpt-step")

    def tensor(self, key: str) -> torch.Tensor:
        """Read one tensor, put together from the pieces that all ranks wrote."""
        entry = self._entry(key, TensorStorageMetadata)
        whole = torch.empty(entry.size, dtype=entry.properties.dtype)
        for chunk in entry.chunks:
            piece = self._load(MetadataIndex(key, chunk.offsets), [])
            if not isinstance(piece, torch.Tensor) or piece.shape != chunk.sizes:
                raise ConfigError(f"{self.path}: {key}: a piece of it is not the tensor of shape {list(chunk.sizes)} "
                                  f"that {METADATA_FILE} promises; copy the checkpoint again")
            target = whole
            for dim, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
                target = target.narrow(dim, offset, size)
            target.copy_(piece)
        return whole

    def object(self, key: str, classes: Sequence[Any] = ()) -> Any:
        """Read a value that is no tensor; beside plain values it may hold instances of `classes`."""
        self._entry(key, BytesStorageMetadata)
        return self._load(MetadataIndex(key), classes)

    def _entry(self, key: str, kind: type) -> Any:
        entry = self._entries.get(key)
        if not isinstance(entry, kind):
            raise ConfigError(f"{self.path}: holds no {'tensor' if kind is TensorStorageMetadata else 'value'} {key}; "
                              "it is not the kind of checkpoint that was asked for")
        return entry

    def _load(self, index: MetadataIndex, classes: Sequence[Any]) -> Any:
        try:
            info = self._storage[index]
        except KeyError:
            raise ConfigError(f"{self.path}: {index.fqn}: {METADATA_FILE} does not say where it is; copy the "
                              "checkpoint again") from None
        place = self.path / info.relative_path
        if Path(info.relative_path).name != info.relative_path or info.transform_descriptors:
            raise ConfigError(f"{self.path}: {index.fqn} is stored at {info.relative_path!r}, transformed by "
                              f"{info.transform_descriptors}; only plain files of the folder itself are read")
        try:
            with place.open("rb") as file:
                file.seek(info.offset)
                contents = file.read(info.length)
        except OSError as error:
            raise ConfigError(f"{place}: cannot read {index.fqn} ({error.strerror}); copy the checkpoint again"
                              ) from error
        if len(contents) < info.length:
            raise ConfigError(f"{place}: ends {info.length - len(contents)} bytes before the end of {index.fqn}: "
                              "truncated; copy the checkpoint again")
        try:
            with torch.serialization.safe_globals(list(classes)):
                return torch.load(io.BytesIO(contents), map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises anything over damaged bytes
            raise ConfigError(f"{place}: {index.fqn} is damaged or unsafe ({str(error).splitlines()[0]}); copy the "
                              "checkpoint again") from error
