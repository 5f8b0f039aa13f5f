"""Read a torch.distributed.checkpoint folder, HRM-Text's or Megatron's, without executing anything in it.

torch's own reader unpickles `.metadata` without restrictions, which can execute code. Here only the classes that such a
file needs are allowed, and the data is read with `weights_only`. torch's reader does not detect damage either: here
nothing is returned whose checksum is wrong.
"""
from __future__ import annotations

import io
import itertools
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint import filesystem, metadata
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex, TensorStorageMetadata

from hrm_megatron.checkpoint.archive import WAY_OUT, DamagedError, check_archive, naming
from hrm_megatron.checkpoint.manifest import METADATA_FILE, read_manifest, size_of
from hrm_megatron.config import ConfigError

ALLOWED: dict[tuple[str, str], Any] = {
    **{(metadata.__name__, cls.__name__): cls for cls in (
        metadata.Metadata, MetadataIndex, TensorStorageMetadata, BytesStorageMetadata, metadata.ChunkStorageMetadata,
        metadata.TensorProperties, metadata.StorageMeta, metadata._MEM_FORMAT_ENCODING)},
    (filesystem.__name__, "_StorageInfo"): filesystem._StorageInfo,
    ("torch.serialization", "_get_layout"): torch.serialization._get_layout,  # only a table look-up
    ("torch", "Size"): torch.Size,
    ("collections", "OrderedDict"): dict,
    # The path that the checkpoint was written to, which nothing here uses.
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


@dataclass(frozen=True)
class Piece:
    """One torch.save archive: its file, offset, length, and the key that it belongs to."""

    file: str
    start: int
    length: int
    key: str


class DCPFolder:
    """Tensors and small objects of one folder, by key; a tensor is read on request.

    With `verify`, everything read is compared with its checksum, and with the manifest if the folder has one.
    """

    def __init__(self, path: str | Path, verify: bool = True) -> None:
        self.path, self.verify = Path(path), verify
        self.manifest = read_manifest(self.path) if verify else None
        place = self.path / METADATA_FILE
        try:
            contents = place.read_bytes()
            if self.manifest:  # before unpickling: the bytes may be damaged
                self.manifest.check_contents(METADATA_FILE, contents)
            loaded = _MetadataUnpickler(io.BytesIO(contents)).load()
            self._entries: dict[str, Any] = loaded.state_dict_metadata
            self._storage: dict[MetadataIndex, Any] = loaded.storage_data
            self._pieces = sorted((Piece(str(info.relative_path), int(info.offset), int(info.length), str(index.fqn))
                                   for index, info in self._storage.items()), key=lambda p: (p.file, p.start))
            self._check_entries()
        except DamagedError:
            raise
        except ConfigError as error:
            raise DamagedError(f"{place}: {error}") from None
        except OSError as error:
            raise DamagedError(f"{place}: cannot read ({error.strerror}); the folder is no torch.distributed "
                               "checkpoint, or its writing was cut off") from error
        except Exception as error:  # over damaged bytes pickle may raise anything
            raise DamagedError(f"{place}: damaged ({error}); copy the checkpoint again") from error

    def keys(self) -> list[str]:
        return list(self._entries)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor by key."""
        return {key: tuple(entry.size) for key, entry in self._entries.items()
                if isinstance(entry, TensorStorageMetadata)}

    def pieces(self) -> list[Piece]:
        """Return everything that is stored, file by file, in the order of offsets."""
        return self._pieces

    def check_files(self, rank: int = 0, ranks: int = 1) -> None:
        """Raise DamagedError unless the pieces are contiguous and exactly fill this rank's share of the files."""
        ends: dict[str, int] = {}
        for piece in self._pieces:
            if piece.start != ends.get(piece.file, 0):
                raise DamagedError(f"{self.path / piece.file}: {piece.key} begins at byte {piece.start}, what is "
                                   f"before it ends at {ends.get(piece.file, 0)}, says {METADATA_FILE}; {WAY_OUT}")
            ends[piece.file] = piece.start + piece.length
        for name, end in [*ends.items()][rank::ranks]:
            place = self.path / name
            if (size := size_of(place) or 0) != end:
                raise DamagedError(f"{place}: {size} bytes are there, {METADATA_FILE} promises {end}; {WAY_OUT}")

    def check_pieces(self, pieces: Iterable[Piece]) -> None:
        """Raise DamagedError unless the bytes of these pieces match their checksums."""
        for name, of_file in itertools.groupby(pieces, key=lambda piece: piece.file):
            place = self.path / name
            with naming(place), place.open("rb", buffering=0) as file:
                for piece in of_file:
                    with naming(place, piece.key):
                        check_archive(file, piece.start, piece.start + piece.length)

    def _check_entries(self) -> None:
        """Raise an error unless the pieces of every tensor cover it exactly, and the location of each is known."""
        wanted: set[MetadataIndex] = set()
        for key, entry in self._entries.items():
            if isinstance(entry, TensorStorageMetadata):
                if not _fill(entry.size, [(chunk.offsets, chunk.sizes) for chunk in entry.chunks]):
                    raise DamagedError(f"{self.path}: {key}: its pieces are not the whole tensor of "
                                       f"{list(entry.size)}; {WAY_OUT}")
                wanted |= {MetadataIndex(key, chunk.offsets) for chunk in entry.chunks}
            else:
                wanted.add(MetadataIndex(key))
        for index in sorted(wanted ^ self._storage.keys(), key=str):
            raise DamagedError(f"{self.path / METADATA_FILE}: says either what {index.fqn} is or where it is, not "
                               f"both; {WAY_OUT}")
        for name in {piece.file for piece in self._pieces}:
            _check_plain(name)

    def tensor(self, key: str) -> torch.Tensor:
        """Read one tensor, assembled from the pieces that all ranks wrote."""
        entry = self._entry(key, TensorStorageMetadata)
        whole = torch.empty(entry.size, dtype=entry.properties.dtype)
        for chunk in entry.chunks:
            piece = self._load(MetadataIndex(key, chunk.offsets), [])
            if not isinstance(piece, torch.Tensor) or (piece.shape, piece.dtype) != (chunk.sizes, whole.dtype):
                raise DamagedError(f"{self.path}: {key}: a piece of it is not the {whole.dtype} tensor of shape "
                                   f"{list(chunk.sizes)} that {METADATA_FILE} promises; copy the checkpoint again")
            target = whole
            for dim, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
                target = target.narrow(dim, offset, size)
            target.copy_(piece)
        return whole

    def object(self, key: str, classes: Sequence[Any] = ()) -> Any:
        """Read a value that is not a tensor; beside plain values it may contain instances of `classes`."""
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
            raise DamagedError(f"{self.path}: {index.fqn}: {METADATA_FILE} does not say where it is; copy the "
                               "checkpoint again") from None
        place = self.path / info.relative_path
        _check_plain(info.relative_path, info.transform_descriptors)
        try:
            with place.open("rb") as file:
                file.seek(info.offset)
                contents = file.read(info.length)
        except OSError as error:
            raise DamagedError(f"{place}: cannot read {index.fqn} ({error.strerror}); copy the checkpoint again"
                               ) from error
        if len(contents) < info.length:
            raise DamagedError(f"{place}: ends {info.length - len(contents)} bytes before the end of {index.fqn}: "
                               "truncated; copy the checkpoint again")
        try:
            if self.verify:
                check_archive(io.BytesIO(contents), 0, len(contents))
            with torch.serialization.safe_globals(list(classes)):
                return torch.load(io.BytesIO(contents), map_location="cpu", weights_only=True)
        except Exception as error:  # over damaged bytes torch.load may raise anything
            raise DamagedError(f"{place}: {index.fqn} is damaged or unsafe ({_first_line(error)}); copy "
                               "the checkpoint again") from error


def _check_plain(name: str, transforms: object = None) -> None:
    if Path(name).name != name or transforms:
        raise ConfigError(f"data is stored at {name!r}, transformed by {transforms}; only plain files of the folder "
                          "itself are read")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _fill(size: Sequence[int], boxes: Sequence[tuple[Sequence[int], Sequence[int]]]) -> bool:
    """Return whether boxes (offset, size) cover a tensor of this size, every element exactly once."""
    if any(len(offset) != len(size) or len(extent) != len(size) or min((*offset, *extent), default=0) < 0
           or any(a + b > whole for a, b, whole in zip(offset, extent, size, strict=True)) for offset, extent in boxes):
        return False
    # The borders of all boxes form a grid; within a cell every element belongs to the same boxes.
    cuts = [sorted({0, whole, *(o[dim] for o, _ in boxes), *(o[dim] + e[dim] for o, e in boxes)})
            for dim, whole in enumerate(size)]
    owners = np.zeros([len(cut) - 1 for cut in cuts], dtype=np.int32)
    numbers = [{place: number for number, place in enumerate(cut)} for cut in cuts]
    for offset, extent in boxes:
        cells = (slice(number[a], number[a + b]) for number, a, b in zip(numbers, offset, extent, strict=True))
        owners[tuple(cells)] += 1
    return bool((owners == 1).all())
