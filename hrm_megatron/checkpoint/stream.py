"""Write a torch.distributed.checkpoint folder one tensor at a time, whatever the size of the model."""
from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from hrm_megatron.checkpoint.manifest import TENSORS


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that `make` creates on the CPU when it is about to be written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def made(self) -> torch.Tensor:
        """Create it in a storage of its own: torch.save writes whole storages, not views."""
        tensor = self.make()
        assert (tensor.shape, tensor.dtype) == (self.shape, self.dtype), (tensor.shape, tensor.dtype, self)
        if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
            return tensor
        return tensor.clone(memory_format=torch.contiguous_format)


def write_archive(value: object, file: IO[bytes]) -> None:
    """Write the torch.save archive of a value, or raise the OSError that torch hides behind a RuntimeError."""
    try:
        torch.save(value, file)
    except RuntimeError as error:
        if isinstance(error.__context__, OSError):
            raise error.__context__ from error
        raise


def save_lazily(state: Mapping[str, Any], folder: Path, flatten: bool = True) -> None:
    """Write `state` into a folder that torch.distributed.checkpoint and Megatron load, with one tensor in memory at a
    time.

    Its leaves are LazyTensors, tensors, io.BytesIO (stored as they are) and values for torch.save. With `flatten`,
    nested dictionaries become dotted keys, and `.metadata` records the nesting.
    """
    lazy: dict[int, LazyTensor] = {}
    planned = _on_no_device(state, lazy)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of the missing process group, which is intended
        try:
            save(planned, storage_writer=_OneByOne(folder), planner=_Planner(lazy, flatten), no_dist=True)
        except CheckpointException as error:  # hides the original exception, even of a signal
            raise error.failures[0][0] from error


def _on_no_device(state: Any, lazy: dict[int, LazyTensor]) -> Any:
    """Replace each LazyTensor by a meta tensor for torch to plan with; `lazy` maps the id of that to the LazyTensor."""
    if isinstance(state, Mapping):
        return {name: _on_no_device(value, lazy) for name, value in state.items()}
    if not isinstance(state, LazyTensor):
        return state
    planned = torch.empty(state.shape, dtype=state.dtype, device="meta")
    lazy[id(planned)] = state
    return planned


class _Planner(DefaultSavePlanner):
    """Plans as torch does, and creates a tensor only when the writer asks for it."""

    def __init__(self, lazy: Mapping[int, LazyTensor], flatten: bool) -> None:
        super().__init__(flatten_state_dict=flatten)
        self.lazy = lazy

    def lookup_object(self, index: MetadataIndex) -> Any:
        found = super().lookup_object(index)
        return self.lazy[id(found)].made() if id(found) in self.lazy else found

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        return object if isinstance(object, io.BytesIO) else super().transform_object(write_item, object)


class _OneByOne(FileSystemWriter):
    """torch's writer, whose own loop keeps everything it has written in memory."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        name = f"__0_0{TENSORS}"
        results = []
        with (Path(self.path) / name).open("wb") as file:
            for item in plan.items:
                start, data = file.tell(), planner.resolve_data(item)
                if isinstance(data, io.BytesIO):
                    file.write(data.getbuffer())
                else:
                    write_archive(data, file)
                length = file.tell() - start
                results.append(WriteResult(item.index, length, _StorageInfo(name, start, length)))
                del data  # free it before the next one is created
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done
